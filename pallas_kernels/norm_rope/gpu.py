"""RMS norm and rotary embedding on Hopper GPUs in Mosaic GPU: a warpgroup rotates a token's heads in registers."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as gpu
from jaxtyping import Array, Float

from pallas_kernels.core import mosaic
from pallas_kernels.core.rows import Runs
from pallas_kernels.core.rows_gpu import block, launch, row, spans
from pallas_kernels.core.tiles import Tiles

WARPS, LANES = 4, 32


def forward(
    x: Float[Array, "b n d"],
    weight: Float[Array, "runs d"],
    heads: int,
    eps: float,
    table: tuple[Float[Array, "#b n head_dim"], Float[Array, "#b n head_dim"]] | None,
    runs: Runs,
    sizes: Tiles,
    *,
    interpret: Any = None,
) -> Float[Array, "b n heads head_dim"]:
    """`pallas_kernels.norm_rope.by`; a block of the grid has `sizes["block"]` tokens, and `table` is
    `pallas_kernels.norm_rope.signed`.
    """
    b, n, d = x.shape
    blocks = spans(runs, sizes["block"])
    split = (b, n, heads, d // heads)
    return launch(
        partial(_kernel, eps=eps, interpret=interpret is not None),
        jax.ShapeDtypeStruct(split, x.dtype),
        (b, len(blocks)),
        interpret,
    )(x, x.reshape(split), weight.reshape(1, len(runs), *split[2:]), *(table or ()), jnp.asarray(blocks))


def layout(heads: int, head_dim: int) -> Any:
    """Layout of [heads, head_dim]: one head per warp, neighbouring features in one lane."""
    tiling = gpu.Tiling(((WARPS, head_dim), (head_dim // LANES,)))
    return gpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


def _kernel(x, x_heads, weight, *rest, eps: float, interpret: bool):
    *tables, spans, out = rest
    heads, head_dim = out.shape[2:]
    laid = layout(heads, head_dim)

    def load(ref: Any, index: tuple, layout: Any) -> Array:
        return (ref[index] if interpret else mosaic.load(ref, index, layout, optimized=False)).astype(jnp.float32)

    def across(angles: Array) -> Array:
        wide = lax.broadcast_in_dim(angles, (heads, head_dim), [1])
        return wide if interpret else gpu.layout_cast(wide, laid)

    sample, start, stop, mine = block(spans, weight)
    weights = load(weight, mine, laid)

    def step(token, _):
        features = row(x, (sample, token), interpret)
        rate = lax.rsqrt(jnp.sum(features * features) / features.shape[0] + eps)
        y = load(x_heads, (sample, token), laid) * rate * weights  # a second read, which the cache serves
        if tables:
            cos, sin = (
                across(load(t, (sample if t.shape[0] > 1 else jnp.int32(0), token), laid.reduce(0))) for t in tables
            )
            y = y * cos + (_swap_pairs(y) if interpret else mosaic.swap_pairs(y, laid)) * sin
        out[sample, token] = y.astype(out.dtype)

    lax.fori_loop(start, stop, step, None)


def _swap_pairs(y: Array) -> Array:
    """`mosaic.swap_pairs` for the interpreter."""
    return y.reshape(*y.shape[:-1], -1, 2)[..., ::-1].reshape(y.shape)
