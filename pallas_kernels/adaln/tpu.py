"""adaLN on TPUs: a block of whole tokens at a time, read once and written once."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.core.rows import Runs, fitting
from pallas_kernels.core.rows_tpu import normed, numbers, select, starts, table_spec
from pallas_kernels.core.tiles import Tiles


def forward(
    x: Float[Array, "b n d"],
    shift: Float[Array, "#b runs d"],
    scale: Float[Array, "#b runs d"],
    runs: Runs,
    eps: float,
    sizes: Tiles,
    *,
    interpret: bool | None = None,
) -> Float[Array, "b n d"]:
    """`pallas_kernels.adaln.reference`, `sizes["block"]` tokens at a time."""
    b, n, d = x.shape
    block = fitting(n, sizes["block"])
    tokens = pl.BlockSpec((1, block, d), lambda i, j: (i, j, 0))
    return pl.pallas_call(
        partial(_forward, runs=runs, eps=eps),
        grid=(b, pl.cdiv(n, block)),
        in_specs=[tokens, table_spec(shift), table_spec(scale)],
        out_specs=tokens,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=bool(interpret),
        name="adaln",
    )(x, shift.astype(jnp.float32), scale.astype(jnp.float32))


def backward(
    x: Float[Array, "b n d"],
    scale: Float[Array, "#b runs d"],
    gradient: Float[Array, "b n d"],
    runs: Runs,
    eps: float,
    sizes: Tiles,
    *,
    interpret: bool | None = None,
) -> tuple[Float[Array, "b n d"], Float[Array, "b runs d"], Float[Array, "b runs d"]]:
    """Gradients of `x`, and of each sample's `shift` and `scale` in float32: each row is a sum over its tokens."""
    b, n, d = x.shape
    block = fitting(n, sizes["block"])
    tokens = pl.BlockSpec((1, block, d), lambda i, j: (i, j, 0))
    sums = pl.BlockSpec((1, len(runs), d), lambda i, j: (i, 0, 0))
    table = jax.ShapeDtypeStruct((b, len(runs), d), jnp.float32)
    return pl.pallas_call(
        partial(_backward, runs=runs, eps=eps),
        grid=(b, pl.cdiv(n, block)),
        in_specs=[tokens, table_spec(scale), tokens],
        out_specs=(tokens, sums, sums),
        out_shape=(jax.ShapeDtypeStruct(x.shape, x.dtype), table, table),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=bool(interpret),
        name="adaln_backward",
    )(x, scale.astype(jnp.float32), gradient)


def _forward(x, shift, scale, out, *, runs: Runs, eps: float):
    token = numbers(x.shape[1])
    y, _ = normed(x[0].astype(jnp.float32), eps)
    out[0] = (y * (1 + select(scale[0], token, runs)) + select(shift[0], token, runs)).astype(out.dtype)


def _backward(x, scale, gradient, dx, dshift, dscale, *, runs: Runs, eps: float):
    block, bounds = x.shape[1], starts(runs)
    token = numbers(block)
    inside = token < bounds[-1]  # values beyond the last token are arbitrary and may be NaN
    y, rate = normed(jnp.where(inside, x[0].astype(jnp.float32), 0), eps)
    upper = jnp.where(inside, gradient[0].astype(jnp.float32), 0)
    inner = upper * (1 + select(scale[0], token, runs))
    slope = (inner * y).mean(-1, keepdims=True)
    dx[0] = (rate * (inner - inner.mean(-1, keepdims=True) - y * slope)).astype(dx.dtype)

    @pl.when(pl.program_id(1) == 0)
    def _():
        dshift[...] = jnp.zeros_like(dshift)
        dscale[...] = jnp.zeros_like(dscale)

    first = pl.program_id(1) * block
    for i, (start, stop) in enumerate(pairwise(bounds)):

        @pl.when((first < stop) & (first + block > start))
        def _(i=i, start=start, stop=stop):
            mine = jnp.where((token >= start) & (token < stop), upper, 0)
            dshift[0, i : i + 1] += mine.sum(0, keepdims=True)
            dscale[0, i : i + 1] += (mine * y).sum(0, keepdims=True)
