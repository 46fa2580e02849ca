"""The tables of a level's steps: for sampling, for a teacher's trajectories, and for the student's training.

The released models are sampled at the times of diffusers: a level's dynamic shift counts the tokens of the size that
the level is entered from, and timesteps are whole numbers. In training, here as upstream, the shift counts the level's
own size, an exponential one is 7 at most, and the student's timesteps are not rounded. A student that was trained here
is sampled at the times that it learnt (`as_trained`).
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from helios_jax.diffusion.denoise import Level
from helios_jax.diffusion.schedule import (
    MAX_SHIFT,
    LevelRange,
    SchedulerConfig,
    dynamic_shift,
    level_ranges,
    shift,
    sigmas,
    upsampling_weights,
)
from helios_jax.diffusion.solvers import SOLVERS, Steps, make_steps

FIRST = 0.999  # sigma that a level's steps begin with, before the shift


def make_levels(
    scheduler: SchedulerConfig,
    counts: Sequence[int],
    tokens: int,
    *,
    pyramid: bool,
    zero_init: int = 0,
    as_trained: bool = False,
) -> tuple[Level, ...]:
    """Levels of `counts` steps, coarsest first, for `tokens` at full size.

    The first `zero_init` steps take a velocity of zero (CFG-Zero*'s zero init). Without a pyramid there is one level.
    Times are those of diffusers or, with `as_trained`, those of training.
    """
    if not pyramid:
        table = sigmas(scheduler, counts[0], tokens)
        steps = make_steps(scheduler, table[:-1] * scheduler.num_train_timesteps, table)
        return _with_zero_init((Level(steps, begin=jnp.float32(1), end=jnp.float32(0)),), zero_init)
    few = SOLVERS[scheduler.scheduler_type].few_steps
    counted = _counted(tokens, len(counts), as_trained)
    tables = [
        level_table(scheduler, *level, few=few, as_trained=as_trained)
        for level in zip(level_ranges(scheduler), counts, counted, strict=True)
    ]
    return _assembled(scheduler, tables, zero_init)


@dataclass(frozen=True)
class Trajectory:
    """A teacher's levels and, for each of them, the student's steps: their indices among the teacher's (`places`),
    their timesteps (not rounded) and their sigmas."""

    levels: tuple[Level, ...]
    places: tuple[tuple[int, ...], ...]
    timesteps: tuple[np.ndarray, ...]
    sigmas: tuple[np.ndarray, ...]


def make_trajectory(
    scheduler: SchedulerConfig, steps: Sequence[int], student_steps: Sequence[int], tokens: int, zero_init: int = 0
) -> Trajectory:
    """The teacher's levels for `tokens` at full size; the steps of each include the student's.

    Times are those of training, but that the teacher's timesteps are whole numbers. `zero_init` is as in `make_levels`.
    """
    tables, made = [], []
    own_size = _counted(tokens, len(steps), as_trained=True)
    for i, level in enumerate(level_ranges(scheduler)):
        teacher, student = (
            np.stack(_grid(scheduler, level, counts[i], few)) for counts, few in ((steps, False), (student_steps, True))
        )
        own = teacher[:, np.abs(teacher[0][:, None] - student[0]).min(1) > 1e-7]
        both = np.concatenate([own, student], 1)
        table, timesteps = both[:, np.argsort(-both[0])]
        places = [int(np.flatnonzero(table == sigma)[0]) for sigma in student[0]]
        timesteps, table = _shifted(scheduler, level, table, timesteps, own_size[i], MAX_SHIFT)
        tables.append((np.trunc(timesteps), np.append(table, 0.0)))
        made.append((tuple(places), timesteps[places].astype(np.float32), table[places].astype(np.float32)))
    places, timesteps, table = zip(*made)
    return Trajectory(_assembled(scheduler, tables, zero_init), places, timesteps, table)


def level_table(
    config: SchedulerConfig, level: LevelRange, count: int, tokens: int, *, few: bool, as_trained: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps [steps] and sigmas [steps + 1] of one level whose shift counts `tokens`, float64.

    Sigmas run from 0.999 to 0 within the level; a schedule of `few` steps leaves out the last sigma before 0.
    """
    largest = MAX_SHIFT if as_trained else math.inf
    timesteps, table = _shifted(config, level, *_grid(config, level, count, few), tokens, largest)
    return timesteps if as_trained else np.trunc(timesteps), np.append(table, 0.0)


def _grid(config: SchedulerConfig, level: LevelRange, count: int, few: bool) -> tuple[np.ndarray, np.ndarray]:
    """Sigmas and timesteps of a level's steps before the shift, both evenly spaced."""
    last, (high, low) = FIRST / config.num_train_timesteps, level.timesteps
    return np.linspace(FIRST, last, count + few)[:count], np.linspace(high, low, count + few)[:count]


def _shifted(
    config: SchedulerConfig, level: LevelRange, table: np.ndarray, timesteps: np.ndarray, tokens: int, largest: float
) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps and sigmas after the dynamic shift; timesteps then follow from the sigmas."""
    if config.dynamic is None:
        return timesteps, table
    high, low = level.timesteps
    table = shift(table, dynamic_shift(tokens, config.dynamic, largest))
    return low + table * (high - low), table


def _counted(tokens: int, levels: int, as_trained: bool) -> list[int]:
    """Tokens that each level's dynamic shift counts, of `tokens` at full size."""
    own = [tokens // 4**i for i in reversed(range(levels))]
    return own if as_trained else [own[0], *own[:-1]]


def _assembled(
    scheduler: SchedulerConfig, tables: Sequence[tuple[np.ndarray, np.ndarray]], zero_init: int
) -> tuple[Level, ...]:
    """Levels from their (timesteps, sigmas), with the weights to enter them. `zero_init` is as in `make_levels`."""
    levels = [
        _entry(scheduler, level, i, make_steps(scheduler, *table))
        for i, (level, table) in enumerate(zip(level_ranges(scheduler), tables))
    ]
    return _with_zero_init(tuple(levels), zero_init)


def _with_zero_init(levels: tuple[Level, ...], count: int) -> tuple[Level, ...]:
    """Sets the velocity of the first `count` steps of the first level to zero."""
    if not count:
        return levels
    first, *later = levels
    moves = (jnp.arange(len(first.steps.timestep)) >= count).astype(jnp.float32)
    return (dataclasses.replace(first, moves=moves), *later)


def _entry(scheduler: SchedulerConfig, level: LevelRange, i: int, steps: Steps) -> Level:
    begin, end = jnp.float32(level.start), jnp.float32(level.end)
    if i == 0:  # its path begins with noise alone, although the first sigma of the table is below 1
        return Level(steps, begin=jnp.float32(1), end=end)
    alpha, beta = (jnp.asarray(x, jnp.float32) for x in upsampling_weights(level.entry, scheduler.gamma))
    return Level(steps, None, begin, end, alpha, beta, scheduler.gamma)
