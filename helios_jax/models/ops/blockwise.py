"""Attention a block of queries after the other, so that the logits of a block are all there are at a time.

On a CPU they stay in its caches; elsewhere they would not fit into memory: 20 GB in the 14B model's self-attention.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

CACHE, MEMORY = 2**21, 2**28  # logits of a block: 8 MB, 1 GB


def blockwise(
    query: Float[Array, "b n heads head_dim"],
    key: Float[Array, "b m heads head_dim"],
    value: Float[Array, "b m heads head_dim"],
    *,
    block: int,
) -> Float[Array, "b n heads head_dim"]:
    """softmax(query key^T / sqrt(head_dim)) value; the softmax is float32, and divides after the second product.

    A block has about `block` logits; twice as many are left together.
    """
    query, key, value = (jnp.moveaxis(x, 2, 1) for x in (query * query.shape[-1] ** -0.5, key, value))
    b, heads, n, head_dim = query.shape
    total = b * heads * n * key.shape[2]
    size = n if total <= 2 * block else -(-n // -(-total // block))

    def attend(query: Array) -> Array:
        logits = jnp.einsum("bhnd,bhmd->bhnm", query, key, preferred_element_type=jnp.float32)
        weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
        out = jnp.einsum("bhnm,bhmd->bhnd", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
        return (out / weights.sum(-1, keepdims=True)).astype(value.dtype)

    if size == n:
        out = attend(query)
    else:
        blocks = -(-n // size)
        padded = jnp.pad(query, [(0, 0), (0, 0), (0, blocks * size - n), (0, 0)])
        split = jnp.moveaxis(padded.reshape(b, heads, blocks, size, head_dim), 2, 0)
        out = jnp.moveaxis(jax.lax.map(attend, split), 0, 2).reshape(b, heads, blocks * size, head_dim)[:, :, :n]
    return jnp.moveaxis(out, 1, 2)
