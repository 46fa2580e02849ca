"""Solvers are one table: a new one is a function of its coefficients and a line there."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from helios_jax.diffusion.levels import make_levels
from helios_jax.diffusion.schedule import SchedulerConfig
from helios_jax.diffusion.solvers import SOLVERS, Coefficients, Solver, advance, start
from tests import tiny


def adams_bashforth(sigmas, settings):
    """A second-order Adams-Bashforth step in x and m, Euler's at first."""
    ratio = sigmas[1:] / sigmas[:-1]
    now, before = (1 - ratio) * 1.5, (1 - ratio) * -0.5
    now[0], before[0] = 1 - ratio[0], 0.0
    return Coefficients(np.stack([ratio, now, before], 1))


@pytest.mark.parametrize("few_steps", [False, True])
def test_a_solver_is_added_in_one_table(few_steps, monkeypatch):
    monkeypatch.setitem(SOLVERS, "adams", Solver(adams_bashforth, few_steps))
    config = SchedulerConfig(scheduler_type="adams")
    levels = make_levels(config, (2, 2, 2), 96, pyramid=True)
    assert [level.steps.predictor.shape for level in levels] == [(2, 3)] * 3
    pipe = tiny.pipeline()
    pipe.scheduler = dataclasses.replace(pipe.scheduler, scheduler_type="adams")
    small = {"height": 32, "width": 48, "num_latent_frames_per_chunk": 3, "num_inference_steps": 2}
    latents = pipe("a red plus", num_frames=9, **small, output_type="latent").frames
    assert np.isfinite(latents).all()


def test_an_unknown_solver_is_one_line_that_names_the_known_ones():
    with pytest.raises(ValueError, match="scheduler_type is 'heun', not one of euler, unipc, dmd"):
        SchedulerConfig(scheduler_type="heun")


@pytest.mark.parametrize("name", list(SOLVERS))
def test_one_step_goes_to_what_the_model_predicts(name):
    """With sigma 0 after it, a single step of every solver results in x - sigma v."""
    levels = make_levels(SchedulerConfig(scheduler_type=name), (1, 1, 1), 96, pyramid=True)
    x, v = (jnp.asarray(np.random.default_rng(i).standard_normal((2, 3)), jnp.float32) for i in range(2))
    for level in levels:
        row = dataclasses.replace(level.steps, **{
            f.name: None if (table := getattr(level.steps, f.name)) is None else table[0]
            for f in dataclasses.fields(level.steps)
        })  # fmt: skip
        after = advance(start(x, level.steps), v, row)
        np.testing.assert_allclose(after.sample, x - level.steps.sigma[0] * v, atol=1e-6)
