"""Sigma tables, shifts and solvers against diffusers' HeliosScheduler, driven by an arbitrary velocity field."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.reference
torch = pytest.importorskip("torch")

from diffusers import HeliosDMDScheduler, HeliosScheduler  # noqa: E402
from diffusers.pipelines.helios.pipeline_helios import calculate_shift  # noqa: E402
from hypothesis import Phase, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from helios_jax.diffusion import solvers  # noqa: E402
from helios_jax.diffusion.levels import level_table  # noqa: E402
from helios_jax.diffusion.schedule import DMDSchedulerConfig, SchedulerConfig, level_ranges, sigmas  # noqa: E402
from tests.parity.reference import check  # noqa: E402

CASES = settings(max_examples=30, deadline=None, database=None, phases=[Phase.explicit, Phase.generate])


@st.composite
def cases(draw):
    config = {
        "stages": 1,
        "stage_range": (0, 1),
        "scheduler_type": draw(st.sampled_from(["euler", "unipc", "unipc"])),
        "solver_order": draw(st.integers(1, 3)),
        "solver_type": draw(st.sampled_from(["bh1", "bh2"])),
        "lower_order_final": draw(st.booleans()),
        "disable_corrector": draw(st.sampled_from([(), (0,), (1, 2)])),
        "use_dynamic_shifting": draw(st.booleans()),
        "time_shift_type": draw(st.sampled_from(["exponential", "linear"])),
    }
    return config, draw(st.integers(1, 50)), draw(st.integers(16, 40000)), draw(st.integers(0, 2**31 - 1))


def reference(config: dict, steps: int, tokens: int, x, velocity):
    scheduler = HeliosScheduler(**config)
    table = np.linspace(0.999, 0.0, steps + 1)[:-1]
    scheduler.set_timesteps(steps, sigmas=table, mu=calculate_shift(tokens))
    timesteps = scheduler.timesteps
    for t in timesteps:
        x = scheduler.step(velocity(x, t.float() / 1000), t, x, return_dict=False)[0]
    return x, timesteps.numpy(), scheduler.sigmas.numpy()


@given(cases())
@CASES
def test_tables_and_samples(case):
    options, steps, tokens, seed = case
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, 3, 4, 4, 4), np.float32)
    bend = rng.standard_normal(x.shape, np.float32)
    expected, timesteps, table = reference(
        options, steps, tokens, torch.from_numpy(x), lambda x, s: torch.tanh(x * s) + torch.from_numpy(bend)
    )
    config = SchedulerConfig(**options)
    ours = sigmas(config, steps, tokens)
    np.testing.assert_allclose(ours, table, rtol=1e-12, atol=1e-15)
    rows = solvers.make_steps(config, ours[:-1] * 1000, ours)
    np.testing.assert_allclose(rows.timestep, timesteps, rtol=1e-6)

    def body(state, step):
        return solvers.advance(state, jnp.tanh(state.sample * step.timestep / 1000) + bend, step), None

    # A third order without lower final orders amplifies rounding in the last step, in the reference as well.
    unstable = options["scheduler_type"] == "unipc" and not options["lower_order_final"]
    state, _ = jax.jit(lambda x: jax.lax.scan(body, solvers.start(x, rows), rows))(x)
    what = "solver without lower final orders" if unstable else "solver, Euler and UniPC"
    check(what, state.sample, expected, 1e-3 if unstable else 1e-5)


def test_a_scheduler_file_that_cannot_be_used_is_named():
    for options, word in (
        ({"prediction_type": "epsilon"}, "prediction_type"),
        ({"solver_type": "midpoint"}, "solver_type"),
        ({"thresholding": True}, "thresholding"),
        ({"use_dynamic_shifting": True, "shift": 3.0}, "shift"),
    ):
        with pytest.raises(ValueError, match=word):
            SchedulerConfig(**options)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("few", [False, True])
def test_pyramid_tables(few, dynamic, kind):
    options = {"use_dynamic_shifting": dynamic, "time_shift_type": kind}
    scheduler = (HeliosDMDScheduler if few else HeliosScheduler)(**options)
    config = (DMDSchedulerConfig if few else SchedulerConfig)(**options)
    for i, stage in enumerate(level_ranges(config)):
        expected = scheduler.start_sigmas[i], scheduler.end_sigmas[i], scheduler.ori_start_sigmas[i]
        np.testing.assert_allclose((stage.start, stage.end, stage.entry), expected, rtol=0, atol=1e-14)
        for steps, tokens, twice in itertools.product((1, 2, 3, 20), (96, 540, 8640), (False, True)):
            if twice and not few:
                continue
            scheduler.set_timesteps(steps, i, mu=calculate_shift(tokens), is_amplify_first_chunk=twice)
            timesteps, table = level_table(config, stage, 2 * steps if twice else steps, tokens, few=few)
            np.testing.assert_array_equal(timesteps, np.trunc(scheduler.timesteps.numpy()))
            np.testing.assert_allclose(table, scheduler.sigmas.numpy(), rtol=0, atol=1e-12)
