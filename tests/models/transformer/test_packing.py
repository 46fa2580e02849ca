"""Packed sequences compute what each does on its own; remat changes memory and nothing else."""

import dataclasses
from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helios_jax.diffusion import memory as memories
from helios_jax.diffusion.memory import MemoryConfig
from helios_jax.models.ops.attention import attention
from helios_jax.models.ops.choices import Implementations
from helios_jax.models.transformer import Transformer, TransformerConfig
from helios_jax.models.transformer.packing import Packing
from helios_jax.models.transformer.remat import Remat
from helios_jax.sharding import AXES
from tests import tiny
from tests.closeness import assert_close


def test_a_segment_sees_itself_alone():
    """Against a mask, with segments that lie in several runs."""
    rng = np.random.default_rng(0)
    asks, answers = np.array([0, 0, 1, 2, 1, 0]), np.array([0, 1, 2, 2, 1, 0, 1])
    q, k, v = (jnp.asarray(rng.standard_normal((2, n, 3, 8), np.float32)) for n in (6, 7, 7))
    hidden = jnp.where(asks[:, None] == answers, 0.0, -jnp.inf)
    logits = jnp.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(8) + hidden
    expected = jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(logits, -1), v)
    got = attention(q, k, v, segments=(asks, answers))
    assert_close(got, expected)


def test_rows_go_to_their_tokens():
    rows = jnp.asarray([[[0.0], [1.0], [2.0]]])
    packing = Packing(history=2, noisy=(1, 3))
    assert packing.rows(rows)[0, :, 0].tolist() == [0, 0, 0, 0, 1, 2, 2, 2]
    assert packing.rows(rows, history=False)[0, :, 0].tolist() == [1, 2, 2, 2]
    each = jnp.asarray([[[5.0], [6.0], [1.0], [2.0]]])
    assert packing.rows(each)[0, :, 0].tolist() == [5, 5, 6, 6, 1, 2, 2, 2]
    segments = packing.segments(history=False)
    assert segments is not None
    assert [ids.tolist() for ids in segments] == [[0, 1, 1, 1], [0, 0, 1, 1, 0, 1, 1, 1]]


def inputs(config: TransformerConfig, scales=(2, 2, 1), size=(8, 8)):
    """Latents of some levels at their timesteps, text, and history of which every sample knows another part."""
    rng = np.random.default_rng(1)

    def noise(*shape):
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    memory = MemoryConfig(long=4, mid=2, recent=1, frames_per_chunk=3)
    empty = memories.empty(memory, 2, *size, config.in_channels)
    parts, indices = memories.window(memory, jax.tree.map(lambda x: noise(*x.shape), empty))
    latents = tuple(noise(2, 3, size[0] // s, size[1] // s, config.in_channels) for s in scales)
    timesteps = jnp.asarray(rng.uniform(0, 1000, (2, len(scales))).astype(np.float32))
    return latents, timesteps, noise(2, 5, config.text_dim), parts, indices


@pytest.mark.parametrize(
    ("stacked", "options"),
    [
        (True, {}),
        (False, {"is_amplify_history": True, "guidance_cross_attn": False, "zero_history_timestep": False}),
    ],
)
def test_packed_levels_are_those_of_calls_on_their_own(stacked, options):
    config = dataclasses.replace(tiny.TRANSFORMER, num_layers=2, **options)
    model = tiny.draw(Transformer.abstract(config, stacked=stacked), np.random.default_rng(0))
    latents, timesteps, text, parts, indices = inputs(config)

    @jax.jit
    def packed(model, latents):
        return model.packed(latents, timesteps, model.text_kv(text), parts, indices)

    @jax.jit
    def alone(model, latents, timestep):
        return model(latents, timestep, model.text_kv(text), parts, indices)

    for i, out in enumerate(packed(model, latents)):
        assert_close(out, alone(model, latents[i], timesteps[:, i]))


def test_a_ring_is_not_gone_around_again_where_attention_is_kept():
    """The rotations of keys and values in a block's forward and backward passes, as they are traced."""
    model = Transformer.abstract(tiny.TRANSFORMER, stacked=True, implementations=Implementations(context="ring"))
    (latents,), timesteps, text, *_ = inputs(tiny.TRANSFORMER, scales=(2,))
    mesh = jax.sharding.AbstractMesh((1, 1, 1, 2), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 4)

    def rotations(remat):
        def loss(model):
            return model(latents, timesteps[:, 0], model.text_kv(text), remat=remat).sum()

        with jax.sharding.use_abstract_mesh(mesh):
            return str(jax.make_jaxpr(jax.grad(loss))(model)).count("ppermute")

    assert rotations("block") == rotations("attention") + 2


def test_every_remat_policy_gives_the_same_gradients():
    config = dataclasses.replace(tiny.TRANSFORMER, num_layers=2)
    model = tiny.draw(Transformer.abstract(config, stacked=True), np.random.default_rng(0))
    (latents,), timesteps, text, *_ = inputs(config, scales=(4,))

    @partial(jax.jit, static_argnums=1)
    def gradients(model, remat):
        def loss(model):
            return jnp.square(model(latents, timesteps[:, 0], model.text_kv(text), remat=remat)).mean()

        return jax.grad(loss)(model)

    plain = gradients(model, None)
    operations = {}
    for name in get_args(Remat):
        program = gradients.lower(model, name).compile()
        operations[name] = program.cost_analysis()["flops"]
        assert_close({name: program(model)}, {name: plain})
    assert operations["attention"] > operations["some_products"] > operations["products"]


def test_without_the_loop_over_blocks_velocity_and_gradients_are_the_same():
    config = dataclasses.replace(tiny.TRANSFORMER, num_layers=3)
    (latents,), timesteps, text, *_ = inputs(config, scales=(4,))

    def loss(model):
        return jnp.square(model(latents, timesteps[:, 0], model.text_kv(text), remat="block")).mean()

    found, loops = [], []
    for unroll in (False, True):
        model = tiny.draw(Transformer.abstract(config, stacked=True, unroll=unroll), np.random.default_rng(0))
        compiled = jax.jit(jax.value_and_grad(loss)).lower(model).compile()
        found.append(jax.tree.leaves(compiled(model)))
        loops.append(compiled.as_text().count(" while("))
    assert_close(found[1], found[0])
    assert loops[1] < loops[0]
