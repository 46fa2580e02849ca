"""Classifier-free guidance and CFG-Zero* (arXiv 2503.18886)."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def guide(
    positive: Float[Array, "b t h w c"],
    negative: Float[Array, "b t h w c"],
    scale: Float[Array, ""],
    *,
    project: bool,
) -> Float[Array, "b t h w c"]:
    """negative + scale * (positive - negative), in float32.

    `project` first scales each sample's `negative` to the projection of `positive` on it (CFG-Zero*).
    """
    if project:
        axes = tuple(range(1, positive.ndim))
        dot = (positive * negative).sum(axes, keepdims=True)
        negative = negative * (dot / (jnp.square(negative).sum(axes, keepdims=True) + 1e-8))
    return negative + scale * (positive - negative)
