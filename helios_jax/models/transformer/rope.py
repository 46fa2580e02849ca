"""Rotary position embedding over time, height and width."""

import jax.numpy as jnp
from einops import reduce
from jaxtyping import Array, Float, Int

from pallas_kernels.norm_rope import Rotary


def _grid(
    frames: Int[Array, "#b t"], height: int, width: int, dims: tuple[int, ...], theta: float
) -> Float[Array, "#b t h w pairs"]:
    """The angle of each pair of features at each place of the grid: those of time, then height, then width."""

    def angles(position, dim):
        return position[..., None] * (1.0 / theta ** (jnp.arange(0, dim, 2, dtype=jnp.float32) / dim))

    b, t = frames.shape
    shape = (b, t, height, width)
    time = angles(frames.astype(jnp.float32), dims[0])[:, :, None, None]
    rows = angles(jnp.arange(height, dtype=jnp.float32), dims[1])[None, None, :, None]
    columns = angles(jnp.arange(width, dtype=jnp.float32), dims[2])[None, None, None, :]
    return jnp.concatenate([jnp.broadcast_to(a, (*shape, a.shape[-1])) for a in (time, rows, columns)], -1)


def pad_replicate(x: Float[Array, "#b t h w c"], multiple: tuple[int, ...]) -> Float[Array, "#b t2 h2 w2 c"]:
    """Repeats the last frame, row and column until each is a multiple."""
    pads = [(0, -size % m) for size, m in zip(x.shape[1:4], multiple)]
    if not any(after for _, after in pads):
        return x
    return jnp.pad(x, [(0, 0), *pads, (0, 0)], mode="edge")


def rotary(
    frames: Int[Array, "#b t"],
    height: int,
    width: int,
    *,
    dims: tuple[int, ...],
    theta: float,
    pool: tuple[int, int, int] = (1, 1, 1),
) -> Rotary:
    """cos and sin tables [b, n, pairs] of the tokens of a `height` x `width` grid at the frame indices `frames`.

    cos and sin are averaged over blocks of `pool` (time, height, width), after padding with replication: the positions
    of the compressed history, not renormalised (diffusers' HeliosRotaryPosEmbed and center_down_sample_3d).
    `dims` are the features of a head given to time, height and width.
    """
    angles = _grid(frames, height, width, dims, theta)
    tables = []
    for table in (jnp.cos(angles), jnp.sin(angles)):
        if max(pool) > 1:
            table = pad_replicate(table, pool)
            table = reduce(table, "b (t i) (h j) (w k) p -> b t h w p", "mean", i=pool[0], j=pool[1], k=pool[2])
        tables.append(table.reshape(table.shape[0], -1, table.shape[-1]))
    return tables[0], tables[1]
