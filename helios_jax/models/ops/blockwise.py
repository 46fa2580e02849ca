"""Attention for one block of queries at a time, so that only the logits of one block exist at a time.

On a CPU they stay in its caches. On other devices all logits together would not fit into memory: 20 GB in the 14B
model's self-attention.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

CACHE, MEMORY = 2**21, 2**28  # logits of a block: 8 MB, 1 GB
LOWEST = -1e30  # a masked key's logit: finite, since all keys of a row may be masked


def blockwise(
    query: Float[Array, "b n heads head_dim"],
    key: Float[Array, "b m heads head_dim"],
    value: Float[Array, "b m heads head_dim"],
    *,
    block: int,
) -> Float[Array, "b n heads head_dim"]:
    """softmax(query key^T / sqrt(head_dim)) value; the softmax is float32, and divides after the second product.

    Splits queries into blocks of about `block` logits; up to twice as many are not split.
    """
    query, key, value = (jnp.moveaxis(x, 2, 1) for x in (_scaled(query), key, value))

    def attend(query: Array) -> Array:
        out, weights, _ = _softmax(query, key, value)
        return (out / weights).astype(value.dtype)

    return jnp.moveaxis(_by_block(attend, query, num_keys=key.shape[2], block=block), 1, 2)


def blockwise_with_log_sums(
    query: Float[Array, "b n heads head_dim"],
    key: Float[Array, "b m heads head_dim"],
    value: Float[Array, "b m heads head_dim"],
    length: Int[Array, ""] | int,
    *,
    block: int,
) -> tuple[Float[Array, "b n heads head_dim"], Float[Array, "b heads n"]]:
    """`blockwise` over the first `length` keys, in float32, and log(sum(exp(logits))) of each query.

    With `length` 0 the output is meaningless, and its log-sum so low that a merge with other keys ignores it.
    """
    query, key, value = (jnp.moveaxis(x, 2, 1) for x in (_scaled(query), key, value))

    def attend(query: Array) -> tuple[Array, Array]:
        out, weights, largest = _softmax(query, key, value, length)
        return out / weights, jnp.log(weights) + largest

    out, log_sums = _by_block(attend, query, num_keys=key.shape[2], block=block)
    return jnp.moveaxis(out, 1, 2), log_sums[..., 0]


def blockwise_gradients(
    query: Float[Array, "b n heads head_dim"],
    key: Float[Array, "b m heads head_dim"],
    value: Float[Array, "b m heads head_dim"],
    cotangent: Float[Array, "b n heads head_dim"],
    log_sums: Float[Array, "b heads n"],
    dots: Float[Array, "b heads n"],
    length: Int[Array, ""] | int,
    *,
    block: int,
) -> tuple[Float[Array, "b n heads head_dim"], Float[Array, "b m heads head_dim"], Float[Array, "b m heads head_dim"]]:
    """Float32 gradients of queries, keys and values for one piece of the keys: the first `length` of those given.

    `log_sums` are over all keys that the queries see, also in other pieces; `dots` are the products of each output with
    its `cotangent`.
    """
    scale = query.shape[-1] ** -0.5
    query, key, value, cotangent = (jnp.moveaxis(x, 2, 1) for x in (_scaled(query), key, value, cotangent))
    zeros = jnp.zeros(key.shape, jnp.float32)

    def product(spec: str, a: Array, b: Array) -> Array:
        return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)

    def add(sums: tuple[Array, Array], rows: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        query, cotangent, log_sums, dots = rows
        logits = _masked(product("bhnd,bhmd->bhnm", query, key), length)
        weights = jnp.exp(logits - log_sums)
        d_logits = weights * (product("bhnd,bhmd->bhnm", cotangent, value) - dots)
        weights, d_logits = weights.astype(value.dtype), d_logits.astype(key.dtype)
        d_key = sums[0] + product("bhnm,bhnd->bhmd", d_logits, query)
        d_value = sums[1] + product("bhnm,bhnd->bhmd", weights, cotangent)
        return (d_key, d_value), product("bhnm,bhmd->bhnd", d_logits, key) * scale

    rows = (query, cotangent.astype(value.dtype), log_sums[..., None], dots[..., None])
    size = _size(query.shape, key.shape[2], block)
    (d_key, d_value), d_query = jax.lax.scan(add, (zeros, zeros), jax.tree.map(lambda x: _blocks(x, size), rows))
    d_query = _joined(d_query, query.shape[2])
    return jnp.moveaxis(d_query, 1, 2), jnp.moveaxis(d_key, 1, 2), jnp.moveaxis(d_value, 1, 2)


def _scaled(query: Array) -> Array:
    return query * query.shape[-1] ** -0.5


def _masked(logits: Float[Array, "b heads n m"], length: Any) -> Float[Array, "b heads n m"]:
    """Logits in which all keys but the first `length` are masked; None masks none."""
    return logits if length is None else jnp.where(jnp.arange(logits.shape[-1]) < length, logits, LOWEST)


def _softmax(query: Array, key: Array, value: Array, length: Any = None) -> tuple[Array, Array, Array]:
    """(sums of values by weight, sums of weights, largest logits) of each query, float32, heads before tokens."""
    logits = jnp.einsum("bhnd,bhmd->bhnm", query, key, preferred_element_type=jnp.float32)
    logits = _masked(logits, length)
    largest = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    weights = jnp.exp(logits - largest)
    out = jnp.einsum("bhnm,bhmd->bhnd", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    return out, weights.sum(-1, keepdims=True), largest


def _by_block(attend: Callable[[Array], Any], query: Float[Array, "b heads n d"], *, num_keys: int, block: int) -> Any:
    """Runs `attend` on one block of queries at a time, or on all at once if they are few."""
    size, n = _size(query.shape, num_keys, block), query.shape[2]
    if size == n:
        return attend(query)
    return jax.tree.map(lambda x: _joined(x, n), jax.lax.map(attend, _blocks(query, size)))


def _size(query: tuple[int, ...], num_keys: int, block: int) -> int:
    """The number of queries in a block; `query` is the shape [b, heads, n, d] of all."""
    b, heads, n, _ = query
    total = b * heads * n * num_keys
    return n if total <= 2 * block else -(-n // -(-total // block))


def _blocks(x: Float[Array, "b heads n d"], size: int) -> Float[Array, "blocks b heads size d"]:
    b, heads, n, d = x.shape
    padded = jnp.pad(x, [(0, 0), (0, 0), (0, -n % size), (0, 0)])
    return jnp.moveaxis(padded.reshape(b, heads, -1, size, d), 2, 0)


def _joined(x: Float[Array, "blocks b heads size d"], n: int) -> Float[Array, "b heads n d"]:
    blocks, b, heads, size, d = x.shape
    return jnp.moveaxis(x, 0, 2).reshape(b, heads, blocks * size, d)[:, :, :n]
