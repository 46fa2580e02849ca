"""Float32 arrays as sums of bfloat16 ones, their parts, for tensor cores that have no products of float32.

They would round to tf32, 10 bits. Three parts of 8 bits are a float32 number exactly, and of the nine products of two
numbers' parts the three smallest are below float32's own rounding (arXiv 1904.06376): six remain. A bfloat16 array is
its one part.
"""

import operator
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

COUNT = {jnp.dtype(jnp.bfloat16): 1, jnp.dtype(jnp.float32): 3}
# Which parts of two arrays are multiplied, by their number; the smallest products first.
PAIRS = {1: ((0, 0),), 3: ((2, 0), (1, 1), (0, 2), (1, 0), (0, 1), (0, 0))}


def of(x: Array, count: int) -> tuple[Array, ...]:
    """Bfloat16 arrays whose sum is nearest to `x`, each nearest to what those before it leave.

    Rounded by bits, for XLA leaves out conversions to bfloat16 and back.
    """
    found = []
    for _ in range(count - 1):
        bits = lax.bitcast_convert_type(x, jnp.uint32)
        nearest = lax.bitcast_convert_type((bits + jnp.uint32(0x8000)) & jnp.uint32(0xFFFF0000), jnp.float32)
        found.append(nearest.astype(jnp.bfloat16))
        x = x - nearest
    return (*found, x.astype(jnp.bfloat16))


def split(x: Float[Array, "b n heads head_dim"]) -> Float[Array, "b n parts_heads head_dim"]:
    """The parts of `x`, in bfloat16: those of all heads beside each other, the largest parts first."""
    return jnp.concatenate(of(x, COUNT[x.dtype]), 2)


def joined(x: Float[Array, "b n parts_heads head_dim"], dtype: Any) -> Float[Array, "b n heads head_dim"]:
    """The array of `dtype` whose parts those are."""
    return added(jnp.split(x.astype(dtype), COUNT[jnp.dtype(dtype)], 2)[::-1])


def added(arrays: Any) -> jax.Array:
    return reduce(operator.add, arrays)
