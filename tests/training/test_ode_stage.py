"""The ode stage: one loss for packed and separate levels, and one batch that is learnt."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helios_jax.sharding import make_mesh
from helios_jax.training.flow_config import PackedPyramidConfig
from helios_jax.training.optim import make_optimizer
from helios_jax.training.stages.ode import ODEConfig, ODEFlowConfig, ODEStage, ODETrainConfig
from helios_jax.training.state import create
from helios_jax.training.train_step import make_step
from tests.training.test_stage3 import BATCH, FAST, SMALL, batch_of, keys, transformer

PYRAMID = PackedPyramidConfig(stage_range=(0, 0.5, 1))


def ode_batch():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    sizes = [(BATCH, 9, n, n, 4) for n in (4, 8)]
    batch = {name: [normal(*size) for size in sizes] for name in ("noisy", "target")}
    batch |= {"timestep": [jnp.array([900.0, 700.0]), jnp.array([400.0, 100.0])]}
    batch |= {"sigma": [jnp.array([0.9, 0.5]), jnp.array([0.8, 0.3])]}
    shared = batch_of()
    return batch | {name: shared[name] for name in ("history", "anchor", "text", "chunk")}


@pytest.fixture(scope="module")
def ode_run():
    """The config, and the metrics of each of 100 steps."""
    config = ODETrainConfig(
        precision="float32", optim=FAST, flow=ODEFlowConfig(pyramid=PYRAMID), distill=ODEConfig(steps=(2, 1))
    )
    config.model.transformer, config.data.batch_size = SMALL, BATCH
    optimizer, mesh = make_optimizer(config.optim, 100), make_mesh(config.mesh)
    state, batch = create(transformer(0), optimizer, None, config.trainable), ode_batch()
    step, found = make_step(ODEStage(config), optimizer, state, mesh), []
    for _ in range(100):
        state, metrics = step(state, batch, jax.random.key(0))
        found.append(jax.device_get(metrics))
    return config, found


@pytest.mark.heavy  # of the flow stage in every run
def test_ode_packed_and_separate_levels_are_one_loss(ode_run):
    config, (packed, *_) = ode_run
    pyramid = dataclasses.replace(PYRAMID, levels="separate")
    config = dataclasses.replace(config, flow=dataclasses.replace(config.flow, pyramid=pyramid))
    separate, parts = jax.jit(lambda m: ODEStage(config).loss(m, ode_batch(), keys()))(transformer(0))
    assert float(packed["loss"]) == pytest.approx(float(separate), rel=1e-5)
    for name, (total, _) in parts.items():
        assert float(packed[name][0]) == pytest.approx(float(total), rel=1e-5), name
    assert float(separate) == pytest.approx(80 * sum(float(x) for x, _ in parts.values()) / (2 * BATCH), rel=1e-5)


def test_ode_one_batch_is_learnt(ode_run):
    losses = [float(metrics["loss"]) for metrics in ode_run[1]]
    assert losses[-1] < 0.3 * losses[0], losses[::10]
