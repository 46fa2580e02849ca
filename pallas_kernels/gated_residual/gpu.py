"""The gated residual and the norm after it on Hopper GPUs in Mosaic GPU: a warpgroup holds a token in registers."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.core.rows import Runs
from pallas_kernels.core.rows_gpu import block, launch, normed, row, spans
from pallas_kernels.core.tiles import Tiles


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
    interpret: Any = None,
) -> tuple[Float[Array, "b m d"], Float[Array, "b m d"]]:
    """`pallas_kernels.gated_residual.reference`; a block of the grid has `sizes["block"]` tokens."""
    b, n, d = x.shape
    blocks = spans(runs, sizes["block"])
    shape = jax.ShapeDtypeStruct((b, sum(runs), d), x.dtype)
    return launch(
        partial(_kernel, first=n - sum(runs), eps=eps, interpret=interpret is not None),
        (shape, shape),
        (b, len(blocks)),
        interpret,
    )(x, y, *(table.astype(jnp.float32) for table in (gate, shift, gain)), jnp.asarray(blocks))


def _kernel(x, y, gate, shift, gain, spans, z, out, *, first: int, eps: float, interpret: bool):
    sample, start, stop, _ = block(spans, gate)
    # Each token reads the rows of the norm again, from a cache: registers hold only one of the three rows.
    gates = row(gate, block(spans, gate)[3], interpret)

    def step(token, _):
        there = (sample, token + first)
        new = (row(x, there, interpret) + gates * row(y, there, interpret)).astype(z.dtype)
        z[sample, token] = new
        after, _ = normed(new.astype(jnp.float32), eps)
        gains, shifts = (row(table, block(spans, table)[3], interpret) for table in (gain, shift))
        out[sample, token] = (after * gains + shifts).astype(out.dtype)

    lax.fori_loop(start, stop, step, None)
