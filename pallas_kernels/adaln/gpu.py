"""adaLN on Hopper GPUs in Mosaic GPU: a warpgroup holds a token in registers, without shared memory.

The kernel needs neither tensor cores nor the copy engine. A block of the grid covers tokens of one run, whose row of
the tables stays in registers. The other blocks on the same multiprocessor hide the latency.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.core.rows import Runs
from pallas_kernels.core.rows_gpu import block, launch, normed, row, spans
from pallas_kernels.core.tiles import Tiles


def forward(
    x: Float[Array, "b n d"],
    shift: Float[Array, "#b runs d"],
    scale: Float[Array, "#b runs d"],
    runs: Runs,
    eps: float,
    sizes: Tiles,
    *,
    interpret: Any = None,
) -> Float[Array, "b n d"]:
    """`pallas_kernels.adaln.reference`; a block of the grid has `sizes["block"]` tokens."""
    blocks = spans(runs, sizes["block"])
    return launch(
        partial(_forward, eps=eps, interpret=interpret is not None),
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        (x.shape[0], len(blocks)),
        interpret,
    )(x, shift.astype(jnp.float32), scale.astype(jnp.float32), jnp.asarray(blocks))


def backward(
    x: Float[Array, "b n d"],
    scale: Float[Array, "#b runs d"],
    gradient: Float[Array, "b n d"],
    runs: Runs,
    eps: float,
    sizes: Tiles,
    *,
    interpret: Any = None,
) -> tuple[Float[Array, "b n d"], Float[Array, "b runs d"], Float[Array, "b runs d"]]:
    """Gradients of `x`, and of each sample's `shift` and `scale` in float32; XLA adds up the sums of the blocks."""
    blocks = spans(runs, sizes["block"])
    sums = jax.ShapeDtypeStruct((x.shape[0], len(blocks), x.shape[2]), jnp.float32)
    dx, *parts = launch(
        partial(_backward, eps=eps, interpret=interpret is not None),
        (jax.ShapeDtypeStruct(x.shape, x.dtype), sums, sums),
        (x.shape[0], len(blocks)),
        interpret,
    )(x, scale.astype(jnp.float32), gradient, jnp.asarray(blocks))
    owners = blocks[:, 2]
    dshift, dscale = (
        jnp.stack([part[:, np.flatnonzero(owners == i)].sum(1) for i in range(len(runs))], 1) for part in parts
    )
    return dx, dshift, dscale


def _forward(x, shift, scale, spans, out, *, eps: float, interpret: bool):
    sample, start, stop, mine = block(spans, scale)
    _, _, _, shifts = block(spans, shift)
    shift_row, scale_row = row(shift, shifts, interpret), row(scale, mine, interpret)

    def step(token, _):
        y, _ = normed(row(x, (sample, token), interpret), eps)
        out[sample, token] = (y * (1 + scale_row) + shift_row).astype(out.dtype)

    lax.fori_loop(start, stop, step, None)


def _backward(x, scale, gradient, spans, dx, dshift, dscale, *, eps: float, interpret: bool):
    sample, start, stop, mine = block(spans, scale)
    scale_row, d = row(scale, mine, interpret), x.shape[-1]

    def step(token, sums):
        y, rate = normed(row(x, (sample, token), interpret), eps)
        upper = row(gradient, (sample, token), interpret)
        inner = upper * (1 + scale_row)
        slope = jnp.sum(inner * y) / d
        dx[sample, token] = (rate * (inner - jnp.sum(inner) / d - y * slope)).astype(dx.dtype)
        return sums[0] + upper, sums[1] + upper * y

    nothing = scale_row * 0
    sums = lax.fori_loop(start, stop, step, (nothing, nothing))
    tile = lax.axis_index("tile")
    dshift[sample, tile], dscale[sample, tile] = sums
