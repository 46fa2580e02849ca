"""A block whose norms run by kernels, interpreted on the CPU, against the same by XLA; which runs where; its scopes."""

import logging
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from helios_jax import lora
from helios_jax.models.layers import Linear
from helios_jax.models.ops import choices, mesh_axes, norms
from helios_jax.models.transformer.block import Block, TransformerConfig
from helios_jax.models.transformer.packing import Packing
from helios_jax.sharding import AXES, BATCH
from pallas_kernels.attention import reference as attention
from pallas_kernels.core.device import compiling_for
from tests.closeness import assert_close

TPU = SimpleNamespace(platform="tpu", device_kind="TPU v5")
HOPPER = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3")
CONFIG = TransformerConfig(
    num_attention_heads=2, attention_head_dim=64, rope_dim=(24, 20, 20), ffn_dim=128, is_amplify_history=True
)


def draw(packing: Packing):
    """A block with weights that are not those of its start, and its arguments."""
    rng, block = np.random.default_rng(), Block(CONFIG, rngs=nnx.Rngs(0))

    def normal(*sizes):
        return jnp.asarray(rng.standard_normal(sizes), jnp.float32)

    for norm in (block.attn1.norm_q, block.attn1.norm_k, block.norm2):
        norm.weight[...] = normal(CONFIG.dim)
    tokens = packing.num_history + sum(packing.noisy)
    angles = normal(1, tokens, 32)
    text = tuple(normal(1, 5, 2, 64) for _ in range(2))
    time = normal(1, 1 + len(packing.noisy), 6, CONFIG.dim)
    return block, normal(1, tokens, CONFIG.dim), time, (jnp.cos(angles), jnp.sin(angles)), text


@pytest.mark.parametrize(
    ("packing", "keep_history", "fuses"),
    [
        (Packing(16, (21,)), True, False),
        (Packing(16, (21,)), True, True),
        (Packing(16, (5, 8)), False, True),
    ],
)
def test_a_block_by_kernels_is_that_by_xla(monkeypatch, packing, keep_history, fuses):
    monkeypatch.setattr(
        "helios_jax.models.transformer.block.attention", lambda *args, **_: attention(*args)
    )  # it has its own tests
    # What takes the residual to its op is the same for all devices; TPUs have another choice.
    monkeypatch.setattr(norms, "fuses_residual", lambda by: fuses and by is None)
    arguments = draw(packing)

    def run():
        return jax.jit(lambda block, *args: block(*args, packing, keep_history=keep_history))(*arguments)

    expected = run()
    with compiling_for(TPU), pltpu.force_tpu_interpret_mode():
        got = run()
    assert_close(got, expected)


def test_the_choice_is_logged(caplog):
    choices.say.cache_clear()
    x = jnp.zeros((2, 3, 512))
    with caplog.at_level(logging.INFO, choices.__name__):
        assert norms.choose(x, 4, None) == "xla"
        with compiling_for(TPU):
            assert norms.choose(x, 4, None) is None
            assert norms.head_major(None)
            assert not norms.fuses_residual(None)
            assert norms.choose(x, 4, "xla") == "xla"
            assert norms.choose(x, 16, None) == "xla"
        with compiling_for(HOPPER):
            assert norms.choose(x, 8, None) == "xla"
            assert norms.choose(x, 8, "pallas") is None
            assert norms.fuses_residual(None)
            assert not norms.head_major(None)
    assert caplog.messages == [
        "norms by xla (cpu)",
        "norms (TPU v5): queries and keys by pallas; adaLN by xla, its gradient by pallas; gated residual by xla",
        "norms by xla (TPU v5): Pallas norm_rope has kernels for head_dim 64 and 128, not 32",
        "norms by xla (NVIDIA H100 80GB HBM3)",
        "norms (NVIDIA H100 80GB HBM3): queries and keys by pallas; adaLN by xla, its gradient by pallas;"
        " gated residual by pallas",
    ]


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [(None, jnp.float32, "this runs on cpu"), (HOPPER, jnp.float16, "not float16"), (TPU, jnp.float16, "not float16")],
)
def test_kernels_that_are_asked_for_and_cannot_run_say_why(device, dtype, reason):
    with compiling_for(device), pytest.raises(ValueError, match=f"norms: .*{reason}.*; .*'xla'"):
        norms.check("pallas", 8, 512, dtype)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ((2, 1, 1, 1), None),
        ((1, 4, 1, 1), None),
        ((2, 1, 2, 1), None),
        ((1, 1, 1, 2), "tokens are split"),
        ((4, 2, 1, 1), "4 samples cannot be split over 8 devices"),
    ],
)
def test_a_mesh_that_splits_what_kernels_need_leaves_xla(sizes, reason):
    mesh = AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    with jax.sharding.use_abstract_mesh(mesh), compiling_for(TPU):
        assert norms.choose(jnp.zeros((4, 3, 256)), 4, None) == (reason and "xla")
        found = norms._split(4)
        if reason:
            with pytest.raises(ValueError, match=f"norms: .*{reason}"):
                norms.choose(jnp.zeros((4, 3, 256)), 4, "pallas")
    assert found is None if reason is None else found.startswith(reason)


def test_heads_that_a_mesh_splits_are_normed_by_xla(caplog):
    """Their norm is across all heads; the other norms' kernels have whole tokens."""
    choices.say.cache_clear()
    mesh = AbstractMesh((1, 1, 2, 1), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    x = jnp.zeros((4, 3, 256))
    with jax.sharding.use_abstract_mesh(mesh), compiling_for(TPU), caplog.at_level(logging.INFO, choices.__name__):
        assert norms.choose(x, 4, None) is None
        assert not norms.head_major(None)
        with pytest.raises(ValueError, match=r"norms: heads are split over the mesh's tensor.*; leave norms out"):
            norms.choose(x, 4, "pallas")
    assert caplog.messages == [
        f"norms (TPU v5): queries and keys by xla ({norms.HEADS_SPLIT}); adaLN by xla, its gradient by pallas;"
        " gated residual by xla"
    ]


def test_profiles_name_the_parts_of_a_block():
    packing = Packing(4, (5,))
    lowered = jax.jit(lambda block, *args: block(*args, packing)).lower(*draw(packing))
    text = lowered.as_text(debug_info=True)
    for scope in ("norms", "self_attention", "cross_attention", "feed_forward"):
        assert f"/{scope}/" in text


def test_products_that_write_or_read_heads_have_bias_and_adapters():
    rng = np.random.default_rng()

    def draw(*sizes):
        return jnp.asarray(rng.standard_normal(sizes), jnp.float32)

    linear, x = Linear(8, 8, rngs=nnx.Rngs(0)), draw(2, 3, 8)
    linear.bias[...] = draw(8)
    weights = (lora.LoRAWeight(draw(*sizes), axes=()) for sizes in ((8, 4), (4, 8), (8,)))
    adapter = lora.LoRA("style", *weights, scaling=jnp.array(0.5), weight=jnp.array(2.0))
    for adapters in ([], [adapter]):
        lora.adapters.set_adapters(linear, adapters)
        assert_close(linear.to_heads(x, 2), linear(x).reshape(2, 3, 2, 4))
        assert_close(linear.from_heads(x.reshape(2, 3, 2, 4)), linear(x))


def test_gradients_are_summed_over_the_axes_that_have_devices_and_no_other():
    """Libtpu keeps sums over one device, and does not fuse across them."""
    mesh = AbstractMesh((2, 1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 4)
    samples = PartitionSpec(BATCH)
    with jax.sharding.use_abstract_mesh(mesh):
        scaled = mesh_axes.each_device(lambda x, weight: x * weight, (samples, PartitionSpec()), samples)
        gradients = jax.grad(lambda x, weight: scaled(x, weight).sum(), argnums=(0, 1))
        text = str(jax.make_jaxpr(gradients)(jnp.ones((4, 3)), jnp.ones(3)))
    assert re.findall(r"psum\w*\[\s*axes=\((.*?)\)", text) == ["'data',"]  # of the weight
