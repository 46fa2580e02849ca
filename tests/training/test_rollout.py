"""Chunks that stage 3's student makes in a row, and the histories that it and its scores see."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from helios_jax.diffusion.corruption import CorruptionConfig, SaturationConfig
from helios_jax.training.stages.distill import rollout
from helios_jax.training.stages.distill.distill_config import RolloutConfig
from tests.closeness import assert_close
from tests.training.test_stage3 import CHUNK, ONE_STEP, batch_of, config_of, keys, make_players


def test_a_rollout_scores_its_last_chunk_after_those_before():
    config = config_of(distill={"gan": None, "rollout": RolloutConfig(2, 2)}, flow={"drop": None, "corruption": None})
    model, batch = make_players(config), batch_of(2)
    inputs = rollout.make_inputs(batch, keys(), config)

    @jax.jit
    def make(m, count):
        return rollout.make_chunk(m.student, inputs, count, keys(), jax.random.key(5), config, with_gradient=False)

    (before, past), (made, history) = (make(model, jnp.asarray(count)) for count in (1, 2))
    assert before.shape == made.shape == CHUNK
    np.testing.assert_array_equal(past.latents, inputs.history.latents)
    assert_close(history.latents[:, -9:], before)
    np.testing.assert_array_equal(rollout.real_chunk(inputs, jnp.asarray(1), config)[0], batch["target"][:, :9])
    own, past = rollout.real_chunk(inputs, jnp.asarray(2), config)
    np.testing.assert_array_equal(own, batch["target"][:, 9:])
    np.testing.assert_array_equal(past.latents[:, -9:], batch["target"][:, :9])
    assert history.chunk.tolist() == past.chunk.tolist() == [1, 3]


def test_the_past_is_corrupted_before_every_chunk_of_a_rollout():
    """Without a history, only the student's own first chunk can be corrupted: by saturation, which no score sees."""
    saturated = CorruptionConfig(clean=1, blur=None, saturation=SaturationConfig(clean=0))
    batch = batch_of(2)
    batch |= {name: jnp.zeros_like(batch[name]) for name in ("history", "anchor")}
    chunks = {}
    for name, corruption in (("clean", None), ("saturated", saturated)):
        config = config_of(
            distill={"gan": None, "rollout": RolloutConfig(2, 2), **ONE_STEP},
            flow={"drop": None, "corruption": corruption},
        )
        model = make_players(config)
        inputs = rollout.make_inputs(batch, keys(), config)

        @jax.jit
        def make(m, count, inputs=inputs, config=config):
            return rollout.make_chunk(m.student, inputs, count, keys(), jax.random.key(5), config, with_gradient=False)

        chunks[name] = *(make(model, jnp.asarray(count))[0] for count in (1, 2)), make(model, jnp.asarray(2))[1]
    first, second, history = zip(*chunks.values())
    np.testing.assert_array_equal(*first)
    assert np.abs(second[0] - second[1]).max() > 1e-3
    np.testing.assert_array_equal(history[0].latents, history[1].latents)
    noisy = dataclasses.replace(config, flow=dataclasses.replace(config.flow, corruption=CorruptionConfig(clean=0)))
    one, two = (rollout.corrupted(history[0], inputs, jnp.asarray(i), noisy)[1].latents for i in (0, 1))
    assert np.abs(one - history[0].latents).max() > 0.01
    assert np.abs(one - two).max() > 0.01  # each chunk has draws of its own
