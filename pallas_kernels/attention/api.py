"""Attention of every query to the first keys of its row, without the [n, m] matrix: values and gradients."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.attention import gpu as attention_gpu
from pallas_kernels.attention import tpu as attention_tpu
from pallas_kernels.core import device, tiles
from pallas_kernels.core.dispatch import Implementation, by_kernel, no_kernels


def reference(
    query: Float[Array, "b n heads head_dim"],
    key: Float[Array, "b m heads head_dim"],
    value: Float[Array, "b m heads head_dim"],
    key_lengths: Int[Array, " b"] | None = None,
) -> Float[Array, "b n heads head_dim"]:
    """softmax(query key^T / sqrt(head_dim)) value over the first `key_lengths` keys; the softmax is float32."""
    scale = query.shape[-1] ** -0.5
    logits = jnp.einsum("bnhd,bmhd->bhnm", query, key, preferred_element_type=jnp.float32) * scale
    if key_lengths is not None:
        logits = jnp.where(jnp.arange(key.shape[1]) < key_lengths[:, None, None, None], logits, -jnp.inf)
    weights = jax.nn.softmax(logits, -1).astype(value.dtype)
    return jnp.einsum("bhnm,bmhd->bnhd", weights, value)


def unsupported(query: Array | jax.ShapeDtypeStruct) -> str | None:
    """The reason why the kernel cannot run here for these queries, or None."""
    head_dim = query.shape[-1]
    if reason := no_kernels("attention"):
        return reason
    if head_dim not in (64, 128):
        return f"Pallas attention has kernels for head_dim 64 and 128, not {head_dim}"
    if device.platform() == "gpu" and query.dtype not in (jnp.bfloat16, jnp.float32):
        return f"Pallas attention on a GPU is bfloat16 or float32, and the queries are {query.dtype}"
    return None


def attention(
    query: Float[Array, "b n heads head_dim"],
    key: Float[Array, "b m heads head_dim"],
    value: Float[Array, "b m heads head_dim"],
    key_lengths: Int[Array, " b"] | None = None,
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "b n heads head_dim"]:
    """`reference` over the first `key_lengths` keys of each row (at least one; None: all keys).

    Without `implementation` the kernel runs if one exists for these inputs, else XLA. Raises ValueError if "pallas" is
    asked for and cannot run.
    """
    if not by_kernel(implementation, unsupported(query), default=True):
        return reference(query, key, value, key_lengths)
    kernels, sizes = _kernels(query)
    return kernels.attention(query, key, value, key_lengths, sizes)


def with_log_sums(
    query: Float[Array, "b n heads head_dim"],
    key: Float[Array, "b m heads head_dim"],
    value: Float[Array, "b m heads head_dim"],
    key_lengths: Int[Array, " b"],
) -> tuple[Float[Array, "b n heads head_dim"], Float[Array, "b heads n"]]:
    """`attention` by the kernel, and log(sum(exp(logits))) of each query and head, for merging with other keys.

    The log-sum of a row without keys is so low that a merge ignores it. Not differentiable: see `gradients`.
    """
    kernels, sizes = _kernels(query)
    return kernels.with_log_sums(query, key, value, key_lengths, sizes)


def gradients(
    query: Float[Array, "b n heads head_dim"],
    key: Float[Array, "b m heads head_dim"],
    value: Float[Array, "b m heads head_dim"],
    cotangent: Float[Array, "b n heads head_dim"],
    log_sums: Float[Array, "b heads n"],
    dots: Float[Array, "b heads n"],
    key_lengths: Int[Array, " b"],
) -> tuple[Float[Array, "b n heads head_dim"], Float[Array, "b m heads head_dim"], Float[Array, "b m heads head_dim"]]:
    """Gradients of queries, keys and values by the kernel, for one piece of the keys that the queries see.

    `log_sums` are over all keys that the queries see, also in other pieces; `dots` are the products of each output with
    its `cotangent`.
    """
    kernels, sizes = _kernels(query)
    return kernels.gradients(query, key, value, cotangent, log_sums, dots, key_lengths, sizes)


def _kernels(query: Array) -> tuple[Any, dict[str, tiles.Tiles]]:
    """(the module with this device's kernels, their block sizes)."""
    kernels = attention_tpu if device.platform() == "tpu" else attention_gpu
    names = kernels.tables(query.dtype)
    return kernels, {op: tiles.lookup(name, device.kind(), query.shape[1]) for op, name in names.items()}
