"""Attention over [b, n, heads, head_dim]."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Implementation = Literal["xla", "cudnn"]


def attention(
    query: Float[Array, "b n heads head_dim"],
    key: Float[Array, "b m heads head_dim"],
    value: Float[Array, "b m heads head_dim"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "b n heads head_dim"]:
    """softmax(query key^T / sqrt(head_dim)) value, every query seeing every key; the softmax is float32.

    Without `implementation` cuDNN runs half-precision inputs on an NVIDIA GPU and XLA everything else.
    """
    if implementation is None:
        half = query.dtype.itemsize == 2 and query.shape[-1] % 8 == 0
        implementation = "cudnn" if jax.default_backend() == "gpu" and half else "xla"
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
    scale = query.shape[-1] ** -0.5
    logits = jnp.einsum("bnhd,bmhd->bhnm", query, key, preferred_element_type=jnp.float32) * scale
    weights = jax.nn.softmax(logits, -1).astype(value.dtype)
    return jnp.einsum("bhnm,bmhd->bnhd", weights, value)
