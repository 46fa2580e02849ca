"""Random exits: in training a level of the student ends at a step drawn at random, so that every step learns.

Each level begins with noise (or the level below, upsampled and noised); a step predicts the level's result, and all but
the last one renoise it with the level's first sample: the DMD solver of `diffusion.solvers`. `denoise_to_exits` takes
the tables that `end_at` makes (paper section 3.5).
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from helios_jax.diffusion.denoise import Level
from helios_jax.diffusion.memory import History


def is_first_chunk(history: History) -> Bool[Array, " b"]:
    """True for samples that have no past at all."""
    return ~(history.latents.any((1, 2, 3, 4)) | history.anchor.any((1, 2, 3, 4)))


def draw_exits(
    key: Key[Array, ""], levels: Sequence[Level], first_levels: Sequence[Level], first: Bool[Array, " b"]
) -> list[Int[Array, " b"]]:
    """The step that each level ends with: one draw for all samples, and one for those that are a first chunk.

    A batch takes as many passes as its longest sample, so samples share a draw.
    """
    exits = []
    for i, counts in enumerate(_counts(levels, first_levels)):
        u = jax.random.uniform(jax.random.fold_in(key, i), (2,))
        exits.append(jnp.floor(u * counts).astype(jnp.int32)[first.astype(jnp.int32)])
    return exits


def end_at(
    exits: Sequence[Int[Array, " b"]],
    levels: Sequence[Level],
    first_levels: Sequence[Level],
    first: Bool[Array, " b"],
) -> list[Level]:
    """Levels with tables [steps, b]: `first_levels` for samples that are `first`, each ending with its step of `exits`.

    The step at the exit returns its prediction of the data. The rows after it must not be used.
    """
    tables = []
    for stop, level, first_level in zip(exits, levels, first_levels, strict=True):
        count = max(len(level.steps.sigma), len(first_level.steps.sigma))

        def choose(x: Array, y: Array, count: int = count) -> Array:
            both = [jnp.pad(a, ((0, count - len(a)), *((0, 0),) * (a.ndim - 1))) for a in (x, y)]
            return jnp.stack(both, 1)[:, first.astype(jnp.int32)]

        steps = jax.tree.map(choose, level.steps, first_level.steps)
        at_exit = jnp.arange(count)[:, None] == stop
        prediction = jnp.zeros(steps.predictor.shape[-1]).at[1].set(1.0)
        steps = dataclasses.replace(
            steps,
            predictor=jnp.where(at_exit[..., None], prediction, steps.predictor),
            restart=jnp.where(at_exit, 0.0, steps.restart),
        )
        tables.append(dataclasses.replace(level, steps=steps))
    return tables


def _counts(levels: Sequence[Level], first_levels: Sequence[Level]) -> list[Int[Array, " 2"]]:
    """Numbers of steps of each level, in later chunks and in a first one."""
    return [jnp.array([len(x.steps.sigma), len(y.steps.sigma)]) for x, y in zip(levels, first_levels, strict=True)]
