"""Attention over [b, n, heads, head_dim]."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from helios_jax.models.blockwise import blockwise

Implementation = Literal["xla", "cudnn"]
# The segment of each query and of each key, known when the program is compiled.
Segments = tuple[np.ndarray, np.ndarray]


def attention(
    query: Float[Array, "b n heads head_dim"],
    key: Float[Array, "b m heads head_dim"],
    value: Float[Array, "b m heads head_dim"],
    *,
    segments: Segments | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "b n heads head_dim"]:
    """softmax(query key^T / sqrt(head_dim)) value, every query seeing every key; the softmax is float32.

    With `segments` a query sees the keys of its own segment only: several sequences packed into one. Each of them is
    then computed on its own, so that nothing is spent on what a mask would hide.
    Without `implementation` cuDNN runs half-precision inputs on an NVIDIA GPU and XLA everything else.
    """
    if implementation is None:
        half = query.dtype.itemsize == 2 and query.shape[-1] % 8 == 0
        implementation = "cudnn" if jax.default_backend() == "gpu" and half else "xla"
    attend: Callable[..., Array] = _xla
    if implementation == "cudnn":
        attend = partial(jax.nn.dot_product_attention, implementation="cudnn")
    if segments is None:
        return attend(query, key, value)
    return _by_segment(attend, query, key, value, segments)


def _xla(query: Array, key: Array, value: Array) -> Array:
    # The choice falls while lowering, so a program compiled on a host for another platform gets that platform's.
    return jax.lax.platform_dependent(query, key, value, cpu=blockwise, default=_at_once)


def _at_once(query: Array, key: Array, value: Array) -> Array:
    scale = query.shape[-1] ** -0.5
    logits = jnp.einsum("bnhd,bmhd->bhnm", query, key, preferred_element_type=jnp.float32) * scale
    weights = jax.nn.softmax(logits, -1).astype(value.dtype)
    return jnp.einsum("bhnm,bmhd->bnhd", weights, value)


def _by_segment(attend: Callable[..., Array], query: Array, key: Array, value: Array, segments: Segments) -> Array:
    parts: list[tuple[int, Array]] = []  # (first token, outputs) of each run of tokens of one segment
    for segment in np.unique(segments[0]):
        asks, answers = (_runs(ids == segment) for ids in segments)
        out = attend(_take(query, asks), _take(key, answers), _take(value, answers))
        ends = np.cumsum([stop - start for start, stop in asks])
        parts += [(start, run) for (start, _), run in zip(asks, jnp.split(out, ends[:-1], 1))]
    return jnp.concatenate([part for _, part in sorted(parts, key=lambda part: part[0])], 1)


def _runs(chosen: np.ndarray) -> list[tuple[int, int]]:
    """[start, stop) of each run of True."""
    edges = np.flatnonzero(np.diff(chosen, prepend=False, append=False))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def _take(x: Array, runs: list[tuple[int, int]]) -> Array:
    return jnp.concatenate([x[:, start:stop] for start, stop in runs], 1)
