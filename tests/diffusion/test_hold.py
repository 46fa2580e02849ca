"""A chunk's first frame that is known: it is held on its path through all levels."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helios_jax.diffusion import solvers
from helios_jax.diffusion.denoise import ChunkNoise, held_velocity, hold, rows, through_levels
from helios_jax.diffusion.levels import make_levels
from helios_jax.diffusion.noising import add_noise
from helios_jax.diffusion.pyramid import downsample, upsample
from helios_jax.diffusion.schedule import DMDSchedulerConfig, SchedulerConfig, level_ranges

SHAPE = (2, 3, 8, 16, 4)
LEVELS = {
    "euler": (SchedulerConfig(scheduler_type="euler"), False, (7,)),
    "unipc": (SchedulerConfig(), False, (7,)),
    "unipc, three levels": (SchedulerConfig(), True, (4, 5, 6)),
    "unipc, two levels": (SchedulerConfig(stages=2, stage_range=(0, 0.5, 1)), True, (4, 5)),
    "dmd, three levels": (DMDSchedulerConfig(), True, (1, 2, 2)),
}


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def levels_of(name):
    scheduler, pyramid, counts = LEVELS[name]
    return make_levels(scheduler, counts, 96, pyramid=pyramid)


@partial(jax.jit, static_argnums=0)
def sampled(name):
    """The first frame, and a chunk that a model of random velocities makes with it."""
    levels, frame = levels_of(name), normal(0, 2, 1, *SHAPE[2:])
    t, h, w, c = SHAPE[1:]
    blocks = tuple(normal(9 + i, 2, t, h >> i, w >> i, c) for i in reversed(range(len(levels) - 1)))
    held = hold(frame, levels)

    def solve(i, level, state):
        for step in range(len(level.steps.sigma)):
            row = jax.tree.map(lambda x, step=step: x[step], rows(level))
            velocity = normal(100 * i + step, *state.sample.shape)
            velocity = held_velocity(velocity, state.sample, row.steps.sigma, held[i])
            state = solvers.advance(state, velocity, row.steps)
            yield state

    *_, last = through_levels(ChunkNoise(normal(1, *SHAPE), blocks), levels, solve)
    return frame, last.sample


@pytest.mark.parametrize("name", LEVELS)
def test_a_chunk_begins_with_the_frame_that_is_known(name):
    frame, chunk = sampled(name)
    np.testing.assert_allclose(chunk[:, :1], frame, atol=1e-4)
    assert np.abs(chunk[:, 1:] - frame).mean() > 0.5


@pytest.mark.parametrize("name", LEVELS)
def test_the_velocity_is_that_of_the_level_s_path(name):
    """The target of training: from one end of the level to the other, with the same noise in both."""
    scheduler, pyramid, _ = LEVELS[name]
    levels, frame = levels_of(name), normal(0, 2, 1, *SHAPE[2:])
    ends = [(each.start if i else 1.0, each.end) for i, each in enumerate(level_ranges(scheduler))]
    ends = ends if pyramid else [(1.0, 0.0)]
    sizes = [frame]
    for _ in levels[1:]:
        sizes.insert(0, downsample(sizes[0]))
    for i, (held, (begin, end)) in enumerate(zip(hold(frame, levels), ends, strict=True)):
        noise = normal(5, *sizes[i].shape)
        first = noise if i == 0 else add_noise(upsample(sizes[i - 1]), noise, jnp.float32(begin))
        last = add_noise(sizes[i], noise, jnp.float32(end))
        for sigma in (0.999, 0.5, 0.1):
            sample = jnp.concatenate([add_noise(last, first, jnp.float32(sigma)), jnp.ones_like(noise)], 1)
            velocity = held_velocity(jnp.zeros_like(sample), sample, jnp.float32(sigma), held)
            np.testing.assert_allclose(velocity[:, :1], first - last, atol=1e-4)
            np.testing.assert_array_equal(velocity[:, 1:], 0)
