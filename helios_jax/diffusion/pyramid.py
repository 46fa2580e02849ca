"""Moves latents between the levels of the pyramid (paper section 3.4)."""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from jaxtyping import Array, Float


def level_shapes(shape: tuple[int, ...], count: int) -> list[tuple[int, ...]]:
    """[t, h, w, ...] at each of `count` levels, coarsest first, of latents that have `shape` at the last."""
    t, h, w, *rest = shape
    return [(t, h >> down, w >> down, *rest) for down in reversed(range(count))]


def downsample(latents: Float[Array, "b t h w c"]) -> Float[Array, "b t h2 w2 c"]:
    """Means of 2 x 2 blocks: bilinear halving without antialiasing."""
    return rearrange(latents, "b t (h i) (w j) c -> b t h w (i j) c", i=2, j=2).mean(4)


def upsample(latents: Float[Array, "b t h w c"]) -> Float[Array, "b t h2 w2 c"]:
    """Each value four times: nearest doubling."""
    return repeat(latents, "b t h w c -> b t (h i) (w j) c", i=2, j=2)


# At gamma = 1/3 the covariance is singular: blocks sum to zero. The reference factorises it in float32, where rounding
# leaves a last pivot of 3 * 2^-24; this much on the diagonal gives the same one in float64.
JITTER = 3 * 2.0**-26


def block_factor(gamma: float, size: int = 4) -> np.ndarray:
    """Lower Cholesky factor of the covariance of a block's noise: 1 on the diagonal and -gamma beside it, float64."""
    covariance = (1 + gamma) * np.eye(size) - gamma * np.ones((size, size))
    return np.linalg.cholesky(covariance + JITTER * np.eye(size))


def block_noise(white: Float[Array, "b t h w c"], gamma: float) -> Float[Array, "b t h w c"]:
    """White noise made negatively correlated within each 2 x 2 block, so that it hides the repeats of upsampling."""
    factor = jnp.asarray(block_factor(gamma), jnp.float32)
    blocks = rearrange(white, "b t (h i) (w j) c -> b t h w c (i j)", i=2, j=2)
    mixed = jnp.einsum("...j,ij->...i", blocks, factor, precision=jax.lax.Precision.HIGHEST)
    return rearrange(mixed, "b t h w c (i j) -> b t (h i) (w j) c", i=2, j=2)
