"""Parts of kernels over rows on TPUs: a block of whole tokens, and the table row of each token."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.core.rows import Runs


def table_spec(table: Float[Array, "#b runs d"]) -> pl.BlockSpec:
    """All rows of a sample's table, for grids whose first axis is the sample."""
    return pl.BlockSpec((1, *table.shape[1:]), lambda i, *_: (i if table.shape[0] > 1 else 0, 0, 0))


def normed(x: Float[Array, "block d"], eps: float) -> tuple[Float[Array, "block d"], Float[Array, "block 1"]]:
    """The layer norm of `x`, float32, and the factor 1 / deviation."""
    x = x - x.mean(-1, keepdims=True)
    rate = lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps)
    return x * rate, rate


def starts(runs: Runs) -> list[int]:
    """The first token of each run, and the number of all tokens."""
    return [sum(runs[:i]) for i in range(len(runs) + 1)]


def select(table: Float[Array, "runs d"], token: Array, runs: Runs) -> Array:
    """Each token's row: [block, d], or [1, d] if there is one run."""
    out = table[:1]
    for i, start in enumerate(starts(runs)[1:-1], 1):
        out = jnp.where(token >= start, table[i : i + 1], out)
    return out


def numbers(block: int) -> Array:
    """[block, 1]: the tokens of this block of the grid's second axis."""
    return pl.program_id(1) * block + lax.broadcasted_iota(jnp.int32, (block, 1), 0)
