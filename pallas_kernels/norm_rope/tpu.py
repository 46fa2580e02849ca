"""RMS norm and rotary embedding on TPUs, written head by head, in the order that attention reads."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.core.rows import LANES, Runs, fitting
from pallas_kernels.core.rows_tpu import numbers, select
from pallas_kernels.core.tiles import Tiles


def forward(
    x: Float[Array, "b n d"],
    weight: Float[Array, "runs d"],
    heads: int,
    eps: float,
    table: tuple[Float[Array, "#b n head_dim"], Float[Array, "#b n head_dim"]] | None,
    runs: Runs,
    sizes: Tiles,
    *,
    interpret: bool | None = None,
) -> Float[Array, "b n heads head_dim"]:
    """`pallas_kernels.norm_rope.by`, `sizes["block"]` tokens at a time; `table` is `pallas_kernels.norm_rope.signed`.

    The kernel writes [b, heads, n, head_dim]; viewing it as [b, n, heads, head_dim] moves no data.
    """
    b, n, d = x.shape
    head_dim, block = d // heads, fitting(n, sizes["block"])
    tables = () if table is None else tuple(jnp.tile(t, LANES // head_dim) for t in table)
    angles = [pl.BlockSpec((1, block, LANES), lambda i, j, of=t: (i if of.shape[0] > 1 else 0, j, 0)) for t in tables]
    out = pl.pallas_call(
        partial(_kernel, runs=runs, eps=eps),
        grid=(b, pl.cdiv(n, block)),
        in_specs=[
            pl.BlockSpec((1, block, d), lambda i, j: (i, j, 0)),
            pl.BlockSpec(weight.shape, lambda i, j: (0, 0)),
            *angles,
        ],
        out_specs=pl.BlockSpec((1, heads, block, head_dim), lambda i, j: (i, 0, j, 0)),
        out_shape=jax.ShapeDtypeStruct((b, heads, n, head_dim), x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=bool(interpret),
        name="norm_rope",
    )(x, weight, *tables)
    return out.transpose(0, 2, 1, 3)


def _kernel(x, weight, *rest, runs: Runs, eps: float):
    *tables, out = rest
    block, head_dim = out.shape[2:]
    token = numbers(block)
    rate = lax.rsqrt(jnp.square(x[0].astype(jnp.float32)).mean(-1, keepdims=True) + eps)
    even = lax.broadcasted_iota(jnp.int32, (block, LANES), 1) % 2 == 0
    for first in range(0, x.shape[2], LANES):  # a head of 128, or two of 64
        there = slice(first, first + LANES)
        y = x[0, :, there].astype(jnp.float32) * rate * select(weight[:, there], token, runs)
        if tables:
            cos, sin = (table[0] for table in tables)
            y = y * cos + jnp.where(even, pltpu.roll(y, LANES - 1, 1), pltpu.roll(y, 1, 1)) * sin
        for part in range(LANES // head_dim):
            out[0, first // head_dim + part] = y[:, part * head_dim : (part + 1) * head_dim].astype(out.dtype)
