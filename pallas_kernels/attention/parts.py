"""Float32 arrays as sums of bfloat16 arrays (parts), for tensor cores without float32 products.

The tensor cores would round float32 to tf32, 10 bits. Three parts of 8 bits represent a float32 number exactly. Of the
nine products of two numbers' parts, the three smallest are below float32's own rounding (arXiv 1904.06376), so six
remain. A bfloat16 array is its own single part.
"""

import operator
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

COUNT = {jnp.dtype(jnp.bfloat16): 1, jnp.dtype(jnp.float32): 3}
# Numbers of the parts of two arrays that are multiplied, smallest products first.
PAIRS = {1: ((0, 0),), 3: ((2, 0), (1, 1), (0, 2), (1, 0), (0, 1), (0, 0))}


def of(x: Array, count: int) -> tuple[Array, ...]:
    """Bfloat16 arrays whose sum is nearest to `x`; each is nearest to the remainder of the ones before.

    Rounds by bit operations, because XLA removes conversions to bfloat16 and back.
    """
    found = []
    for _ in range(count - 1):
        bits = lax.bitcast_convert_type(x, jnp.uint32)
        nearest = lax.bitcast_convert_type((bits + jnp.uint32(0x8000)) & jnp.uint32(0xFFFF0000), jnp.float32)
        found.append(nearest.astype(jnp.bfloat16))
        x = x - nearest
    return (*found, x.astype(jnp.bfloat16))


def split(x: Float[Array, "b n heads head_dim"]) -> Float[Array, "b n parts_heads head_dim"]:
    """The parts of `x` in bfloat16: all heads side by side, the largest parts first."""
    return jnp.concatenate(of(x, COUNT[x.dtype]), 2)


def joined(x: Float[Array, "b n parts_heads head_dim"], dtype: Any) -> Float[Array, "b n heads head_dim"]:
    """The array of `dtype` with these parts."""
    return added(jnp.split(x.astype(dtype), COUNT[jnp.dtype(dtype)], 2)[::-1])


def added(arrays: Any) -> jax.Array:
    return reduce(operator.add, arrays)
