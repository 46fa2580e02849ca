"""Exits of a student that takes every step, as the sampler does."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array

from helios_jax.diffusion.denoise import Level


def last_exits(levels: Sequence[Level], first_levels: Sequence[Level], first: Array) -> list[Array]:
    """The last step of each level; `first_levels` are those of samples that are a video's `first` chunk."""
    counts = ((len(level.steps.sigma), len(own.steps.sigma)) for level, own in zip(levels, first_levels, strict=True))
    return [jnp.where(first, own, usual) - 1 for usual, own in counts]
