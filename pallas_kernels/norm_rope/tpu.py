"""RMS norm and rotary embedding on TPUs, written head by head, in the order that attention reads."""

from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.core.rows import LANES, Runs, fitting
from pallas_kernels.core.rows_tpu import numbers, select, starts
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
    tables, angles = _angles(table, head_dim, block)
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


def backward(
    x: Float[Array, "b n d"],
    weight: Float[Array, "runs d"],
    gradient: Float[Array, "b n heads head_dim"],
    eps: float,
    table: tuple[Float[Array, "#b n head_dim"], Float[Array, "#b n head_dim"]] | None,
    runs: Runs,
    sizes: Tiles,
    *,
    interpret: bool | None = None,
) -> tuple[Float[Array, "b n d"], Float[Array, "runs d"]]:
    """Gradients of `forward`'s `x`, and of its `weight` in float32, for heads of 128 features."""
    b, n, d = x.shape
    (*_, heads, head_dim), block = gradient.shape, fitting(n, sizes["block"])
    tables, angles = _angles(table, head_dim, block)
    tokens = pl.BlockSpec((1, block, d), lambda i, j: (i, j, 0))
    dx, dweight = pl.pallas_call(
        partial(_backward, runs=runs, eps=eps),
        grid=(b, pl.cdiv(n, block)),
        in_specs=[
            tokens,
            pl.BlockSpec(weight.shape, lambda i, j: (0, 0)),
            pl.BlockSpec((1, heads, block, head_dim), lambda i, j: (i, 0, j, 0)),
            *angles,
        ],
        out_specs=(tokens, pl.BlockSpec((1, *weight.shape), lambda i, j: (i, 0, 0))),
        out_shape=(jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct((b, *weight.shape), jnp.float32)),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=bool(interpret),
        name="norm_rope_backward",
    )(x, weight, gradient.transpose(0, 2, 1, 3), *tables)
    return dx, dweight.sum(0)


def _angles(table: Any, head_dim: int, block: int) -> tuple[tuple[Array, ...], list[pl.BlockSpec]]:
    """(the table's arrays for all lanes, the blocks of them); nothing without a table."""
    tables = () if table is None else tuple(jnp.tile(t, LANES // head_dim) for t in table)
    specs = [pl.BlockSpec((1, block, LANES), lambda i, j, of=t: (i if of.shape[0] > 1 else 0, j, 0)) for t in tables]
    return tables, specs


def _kernel(x, weight, *rest, runs: Runs, eps: float):
    *tables, out = rest
    block, head_dim = out.shape[2:]
    token = numbers(block)
    rate = lax.rsqrt(jnp.square(x[0].astype(jnp.float32)).mean(-1, keepdims=True) + eps)
    for first in range(0, x.shape[2], LANES):  # a head of 128, or two of 64
        there = slice(first, first + LANES)
        y = x[0, :, there].astype(jnp.float32) * rate * select(weight[:, there], token, runs)
        if tables:
            cos, sin = (table[0] for table in tables)
            y = y * cos + _exchanged(y) * sin
        for part in range(LANES // head_dim):
            out[0, first // head_dim + part] = y[:, part * head_dim : (part + 1) * head_dim].astype(out.dtype)


def _backward(x, weight, gradient, *rest, runs: Runs, eps: float):
    *tables, dx, dweight = rest
    heads, block = gradient.shape[1:3]
    bounds, token = starts(runs), numbers(block)
    inside = token < bounds[-1]  # values beyond the last token are arbitrary and may be NaN
    square = jnp.square(jnp.where(inside, x[0].astype(jnp.float32), 0))
    rate = lax.rsqrt(square.mean(-1, keepdims=True) + eps)

    def of_head(head: int) -> tuple[Array, Array, Array]:
        """(its features, normed; the gradient of their product with the weights; that times the weights)."""
        there = slice(head * LANES, (head + 1) * LANES)
        y = jnp.where(inside, x[0, :, there].astype(jnp.float32), 0) * rate
        upper = jnp.where(inside, gradient[0, head].astype(jnp.float32), 0)
        if tables:
            cos, sin = (jnp.where(inside, table[0], 0) for table in tables)
            upper = upper * cos - _exchanged(upper) * sin
        return y, upper, upper * select(weight[:, there], token, runs)

    @pl.when(pl.program_id(1) == 0)
    def _():
        dweight[...] = jnp.zeros_like(dweight)

    slope = jnp.zeros((block, 1), jnp.float32)
    for head in range(heads):
        y, upper, inner = of_head(head)
        slope += (inner * y).sum(-1, keepdims=True)
        for i, (start, stop) in enumerate(pairwise(bounds)):
            mine = jnp.where((token >= start) & (token < stop), upper * y, 0)
            dweight[0, i : i + 1, head * LANES : (head + 1) * LANES] += mine.sum(0, keepdims=True)
    slope = slope / x.shape[2]
    for head in range(heads):
        y, inner = of_head(head)[::2]
        dx[0, :, head * LANES : (head + 1) * LANES] = (rate * (inner - y * slope)).astype(dx.dtype)


def _exchanged(y: Float[Array, "block lanes"]) -> Float[Array, "block lanes"]:
    """The two features of each pair exchanged."""
    even = lax.broadcasted_iota(jnp.int32, y.shape, 1) % 2 == 0
    return jnp.where(even, pltpu.roll(y, LANES - 1, 1), pltpu.roll(y, 1, 1))
