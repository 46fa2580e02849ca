"""The tables of a level's steps: for sampling, for a teacher's trajectories, and for the student's training.

Sampling and training differ on purpose. The dynamic shift counts the tokens of the size that a level is "entered" from
in sampling, as diffusers counts before it upsamples, and of its "own" size in training, as upstream does. Timesteps are
whole numbers where the sampler or the teacher hands them to the model, and not rounded where the student learns.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np

from helios_jax.diffusion.denoise import Level
from helios_jax.diffusion.schedule import (
    SchedulerConfig,
    Stage,
    dynamic_shift,
    shift_sigmas,
    sigmas,
    stages,
    upsampling_weights,
)
from helios_jax.diffusion.solvers import SOLVERS, Steps, make_steps

Counted = Literal["entered", "own"]
Shift = Literal["exponential", "linear"] | None
FIRST = 0.999  # sigma that a level's steps begin with, before the shift


def make_levels(
    scheduler: SchedulerConfig,
    counts: Sequence[int],
    tokens: int,
    *,
    pyramid: bool,
    zero_init: int = 0,
    counted: Counted = "entered",
    whole: bool = True,
) -> tuple[Level, ...]:
    """Levels of `counts` steps, coarsest first, for `tokens` at full size.

    The first `zero_init` steps take a velocity of zero (CFG-Zero*'s zero init). Without a pyramid there is one level.
    The defaults are the sampler's; for the student in training the shift counts the level's "own" size, and
    timesteps are not `whole` numbers.
    """
    if not pyramid:
        table = sigmas(scheduler, counts[0], tokens)
        steps = make_steps(scheduler, table[:-1] * scheduler.num_train_timesteps, table)
        return _with_zero_init((Level(steps, begin=jnp.float32(1), end=jnp.float32(0)),), zero_init)
    few = SOLVERS[scheduler.scheduler_type].few_steps
    tables = [
        level_table(scheduler, stage, count, _tokens(tokens, i, len(counts), counted), few=few, whole=whole)
        for i, (stage, count) in enumerate(zip(stages(scheduler), counts, strict=True))
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

    A level's shift counts its own size, as in upstream's training. `zero_init` is as in `make_levels`.
    """
    tables, made = [], []
    for i, stage in enumerate(stages(scheduler)):
        teacher, student = (
            np.stack(_grid(scheduler, stage, counts[i], few)) for counts, few in ((steps, False), (student_steps, True))
        )
        own = teacher[:, np.abs(teacher[0][:, None] - student[0]).min(1) > 1e-7]
        both = np.concatenate([own, student], 1)
        table, timesteps = both[:, np.argsort(-both[0])]
        places = [int(np.flatnonzero(table == sigma)[0]) for sigma in student[0]]
        timesteps, table = _shifted(stage, table, timesteps, _tokens(tokens, i, len(steps), "own"), _shift(scheduler))
        tables.append((np.trunc(timesteps), np.append(table, 0.0)))
        made.append((tuple(places), timesteps[places].astype(np.float32), table[places].astype(np.float32)))
    places, timesteps, table = zip(*made)
    return Trajectory(_assembled(scheduler, tables, zero_init), places, timesteps, table)


def level_table(
    config: SchedulerConfig, stage: Stage, count: int, tokens: int, *, few: bool, whole: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps [steps] and sigmas [steps + 1] of one level whose shift counts `tokens`, float64.

    Sigmas run from 0.999 to 0 within the level; a schedule of `few` steps leaves out the last sigma before 0.
    """
    timesteps, table = _shifted(stage, *_grid(config, stage, count, few), tokens, _shift(config))
    return np.trunc(timesteps) if whole else timesteps, np.append(table, 0.0)


def _grid(config: SchedulerConfig, stage: Stage, count: int, few: bool) -> tuple[np.ndarray, np.ndarray]:
    """Sigmas and timesteps of a level's steps before the shift, both evenly spaced."""
    last, (high, low) = FIRST / config.num_train_timesteps, stage.timesteps
    return np.linspace(FIRST, last, count + few)[:count], np.linspace(high, low, count + few)[:count]


def _shifted(
    stage: Stage, table: np.ndarray, timesteps: np.ndarray, tokens: int, shift: Shift
) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps and sigmas after the dynamic shift; timesteps then follow from the sigmas."""
    if shift is None:
        return timesteps, table
    high, low = stage.timesteps
    table = shift_sigmas(table, dynamic_shift(tokens), shift)
    return low + table * (high - low), table


def _shift(config: SchedulerConfig) -> Shift:
    return config.time_shift_type if config.use_dynamic_shifting else None


def _tokens(tokens: int, level: int, levels: int, counted: Counted) -> int:
    """Tokens that a level's dynamic shift counts, of `tokens` at full size."""
    size = max(level - 1, 0) if counted == "entered" else level
    return tokens // 4 ** (levels - 1 - size)


def _assembled(
    scheduler: SchedulerConfig, tables: Sequence[tuple[np.ndarray, np.ndarray]], zero_init: int
) -> tuple[Level, ...]:
    """Levels from their (timesteps, sigmas), with the weights to enter them. `zero_init` is as in `make_levels`."""
    levels = [
        _entry(scheduler, stage, i, make_steps(scheduler, *table))
        for i, (stage, table) in enumerate(zip(stages(scheduler), tables))
    ]
    return _with_zero_init(tuple(levels), zero_init)


def _with_zero_init(levels: tuple[Level, ...], count: int) -> tuple[Level, ...]:
    """Sets the velocity of the first `count` steps of the first level to zero."""
    if not count:
        return levels
    first, *later = levels
    moves = (jnp.arange(len(first.steps.timestep)) >= count).astype(jnp.float32)
    return (dataclasses.replace(first, moves=moves), *later)


def _entry(scheduler: SchedulerConfig, stage: Stage, i: int, steps: Steps) -> Level:
    begin, end = jnp.float32(stage.start), jnp.float32(stage.end)
    if i == 0:  # its path begins with noise alone, although the first sigma of the table is below 1
        return Level(steps, begin=jnp.float32(1), end=end)
    alpha, beta = (jnp.asarray(x, jnp.float32) for x in upsampling_weights(stage.entry, scheduler.gamma))
    return Level(steps, None, begin, end, alpha, beta, scheduler.gamma)
