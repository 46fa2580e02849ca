"""The gated residual and the norm after it on TPUs: a block of whole tokens at a time."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.core.rows import Runs, fitting
from pallas_kernels.core.rows_tpu import normed, numbers, select, table_spec
from pallas_kernels.core.tiles import Tiles

TILE = 16  # tokens of 16-bit numbers in one tile


def forward(
    x: Float[Array, "b n d"],
    y: Float[Array, "b n d"],
    gate: Float[Array, "#b runs d"],
    shift: Float[Array, "#b runs d"],
    gain: Float[Array, "#b runs d"],
    runs: Runs,
    eps: float,
    sizes: Tiles,
    *,
    interpret: bool | None = None,
) -> tuple[Float[Array, "b m d"], Float[Array, "b m d"]]:
    """`pallas_kernels.gated_residual.reference`, at most `sizes["block"]` tokens at a time.

    The block must divide the number of the first token, which is a multiple of `TILE`.
    """
    (b, n, d), m = x.shape, sum(runs)
    first = n - m
    block = max(size for size in range(TILE, fitting(m, sizes["block"]) + 1, TILE) if first % size == 0)
    tokens = pl.BlockSpec((1, block, d), lambda i, j: (i, j + first // block, 0))
    outs = pl.BlockSpec((1, block, d), lambda i, j: (i, j, 0))
    shape = jax.ShapeDtypeStruct((b, m, d), x.dtype)
    return pl.pallas_call(
        partial(_kernel, runs=runs, eps=eps),
        grid=(b, pl.cdiv(m, block)),
        in_specs=[tokens, tokens, *map(table_spec, (gate, shift, gain))],
        out_specs=(outs, outs),
        out_shape=(shape, shape),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=bool(interpret),
        name="gated_residual",
    )(x, y, *(table.astype(jnp.float32) for table in (gate, shift, gain)))


def _kernel(x, y, gate, shift, gain, z, out, *, runs: Runs, eps: float):
    token = numbers(x.shape[1])
    gated = y[0].astype(jnp.float32) * select(gate[0], token, runs)
    z[0] = (x[0].astype(jnp.float32) + gated).astype(z.dtype)
    after, _ = normed(z[0].astype(jnp.float32), eps)
    out[0] = (after * select(gain[0], token, runs) + select(shift[0], token, runs)).astype(out.dtype)
