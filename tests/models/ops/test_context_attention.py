"""Attention over devices that share tokens is attention on one. The devices are a mapped axis of that name."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from helios_jax.models.ops import attention as attentions
from helios_jax.models.ops import blockwise, choices, context_attention
from helios_jax.models.ops.context_attention import Pieces, ring, ulysses
from helios_jax.models.transformer.packing import Packing
from helios_jax.sharding import AXES, CONTEXT
from pallas_kernels.attention import reference
from pallas_kernels.core.device import compiling_for
from tests.closeness import assert_close

TPU = SimpleNamespace(platform="tpu", device_kind="TPU v5")
HOPPER = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3")
WAYS = 4
# In few blocks, and in many.
PIECES = {
    block: Pieces(
        partial(blockwise.blockwise_with_log_sums, block=block), partial(blockwise.blockwise_gradients, block=block)
    )
    for block in (10**6, 40)
}


def draw(packing: Packing, heads: int = 4):
    """Queries, keys, values and a cotangent of all tokens in order, the padding not zero but large."""
    rng, whole = np.random.default_rng(0), packing.whole
    assert whole is not None
    x = rng.standard_normal((4, 2, whole.num_tokens, heads * 8), np.float32)
    hidden = 100.0 * ~packing.present().reshape(-1)[:, None]
    laid = [packing.laid_out(jnp.asarray(a)) + hidden for a in x]
    shares = [a.reshape(2, WAYS, -1, heads, 8).swapaxes(0, 1) for a in laid]
    return [jnp.asarray(a.reshape(2, -1, heads, 8)) for a in x], shares


def in_order(packing: Packing, shares):
    """Tokens of all devices, without padding, in order; history, then noisy tokens."""
    ways, b, n, heads, head_dim = shares.shape
    x = shares.swapaxes(0, 1).reshape(b, ways, n, heads * head_dim)
    whole = packing.whole
    assert whole is not None
    cut = [x[:, :, : packing.history], x[:, :, packing.history :]]
    sizes = (whole.history, *whole.noisy)
    parts = [part.reshape(b, -1, heads * head_dim)[:, :size] for part, size in zip(cut, sizes, strict=True)]
    return jnp.concatenate(parts, 1).reshape(b, -1, heads, head_dim)


@pytest.mark.parametrize(
    ("op", "heads"),
    [(partial(ulysses, reference), 4), (partial(ring, PIECES[10**6]), 3), (partial(ring, PIECES[40]), 3)],
)
@pytest.mark.parametrize("whole", [Packing(13, (9,)), Packing(4, (8,)), Packing(2, (5,))])
def test_values_and_gradients_are_those_of_one_device(op, heads, whole):
    """With shares that are even, that end with padding, and that are nothing else."""
    packing = whole.shared(WAYS)
    (*arrays, cotangent), (*shares, cotangents) = draw(packing, heads)
    cotangents = cotangents * packing.present()[:, None, :, None, None]

    @jax.jit
    @partial(jax.vmap, axis_name=CONTEXT)
    def apart(*inputs):
        out, pull = jax.vjp(lambda *qkv: op(*qkv, packing.present()), *inputs[:-1])
        return out, pull(inputs[-1])

    out, gradients = apart(*shares, cotangents)
    expected, wanted = jax.jit(lambda *qkv: (reference(*qkv), jax.vjp(reference, *qkv)[1](cotangent)))(*arrays)
    assert_close(in_order(packing, out), expected)
    for got, want in zip(gradients, wanted, strict=True):
        assert_close(in_order(packing, got), want)
        hidden = got * ~packing.present()[:, None, :, None, None]
        np.testing.assert_array_equal(hidden, jnp.zeros_like(hidden))


def test_shares_are_equal_and_come_back_in_order():
    whole = Packing(history=5, noisy=(7, 2))
    packing = whole.shared(3)
    assert (packing.history, packing.noisy, packing.num_tokens) == (2, (3, 1), 8)
    x = jnp.arange(1.0, 20.0).reshape(1, 19, 1)  # 5 and 5 of history, 7 and 2 noisy
    laid = packing.laid_out(x)
    assert laid[0, :8, 0].tolist() == [1, 2, 6, 7, 11, 12, 13, 18]  # the first device's
    assert laid[0, 16:, 0].tolist() == [5, 0, 10, 0, 17, 0, 0, 0]
    np.testing.assert_array_equal(laid[0, :, 0] > 0, packing.present().reshape(-1))
    noisy = laid.reshape(1, 3, 8, 1)[:, :, packing.num_history :].reshape(1, -1, 1)
    assert [part[0, :, 0].tolist() for part in packing.noisy_parts(noisy)] == [[*range(11, 18)], [18, 19]]
    assert whole.shared(1) == whole
    assert whole.present() is None


@pytest.mark.parametrize(
    ("sizes", "heads", "reason"),
    [
        ((1, 1, 1, 3), 40, "context=3 does not divide the 40 heads"),
        ((1, 1, 4, 4), 40, r"does not divide the 10 heads of a device \(40 over tensor=4\)"),
        ((1, 1, 4, 5), 40, None),
        ((8, 1, 3, 8), 40, None),  # tensor leaves the heads whole
    ],
)
def test_ulysses_needs_heads_to_exchange(sizes, heads, reason):
    mesh = AbstractMesh(sizes, AXES)
    context_attention.check("ring", heads, mesh)
    if reason is None:
        context_attention.check("ulysses", heads, mesh)
        return
    with pytest.raises(ValueError, match=reason) as error:
        context_attention.check("ulysses", heads, mesh)
    assert "context_attention=ring" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "line"),
    [
        (None, jnp.float32, 128, "by xla (cpu)"),
        (TPU, jnp.bfloat16, 128, "by pallas (TPU v5)"),
        (TPU, jnp.bfloat16, 32, "by xla (TPU v5): Pallas attention has kernels for head_dim 64 and 128, not 32"),
        (HOPPER, jnp.bfloat16, 128, "by pallas (NVIDIA H100 80GB HBM3)"),
        (HOPPER, jnp.float32, 128, "by xla (NVIDIA H100 80GB HBM3): cuDNN's attention is for bfloat16 and float16"),
    ],
)
def test_what_computes_a_ring_is_logged(caplog, device, dtype, head_dim, line):
    choices.say.cache_clear()
    query = jax.ShapeDtypeStruct((1, 2, 2, head_dim), dtype)
    with caplog.at_level("INFO", choices.__name__), compiling_for(device):
        chosen = attentions._choose_for_ring(query, None)
    assert caplog.messages[0].startswith(f"attention around the ring {line}")
    assert f" by {chosen} " in caplog.messages[0]


def test_a_ring_by_cudnn_is_refused():
    with pytest.raises(
        ValueError, match=r"attention: cuDNN's attention has no gradient for a part of the keys.*'xla'$"
    ):
        attentions.check("cudnn", 128, jnp.bfloat16, "ring")
