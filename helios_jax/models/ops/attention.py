"""Attention over [b, n, heads, head_dim], by one of three implementations."""

import logging
import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from helios_jax.models.ops import choices
from helios_jax.models.ops.blockwise import CACHE, MEMORY, blockwise
from helios_jax.models.ops.choices import Attention
from helios_jax.sharding import BATCH, RULES
from pallas_kernels import attention as pallas
from pallas_kernels.core import device

# The segment of each query and of each key, known when the program is compiled.
Segments = tuple[np.ndarray, np.ndarray]

log = logging.getLogger(__name__)


def attention(
    query: Float[Array, "b n heads head_dim"],
    key: Float[Array, "b m heads head_dim"],
    value: Float[Array, "b m heads head_dim"],
    *,
    segments: Segments | None = None,
    num_keys: int | None = None,
    implementation: Attention | None = None,
) -> Float[Array, "b n heads head_dim"]:
    """softmax(query key^T / sqrt(head_dim)) value, every query seeing every key; the softmax is float32.

    With `num_keys` it sees the first so many; those behind them are padding.
    With `segments` a query sees the keys of its own segment only: several sequences packed into one. Each of them is
    then computed on its own, so that nothing is spent on what a mask would hide.
    Without `implementation` the device's default runs (`choices`), and XLA where that cannot; the log says which.
    Raises ValueError when the one asked for cannot run.
    """
    implementation = _choose(query, implementation)
    attend: Callable[..., Array] = {"xla": _xla, "cudnn": _cudnn, "pallas": _pallas}[implementation]
    if num_keys is not None and num_keys < key.shape[1]:
        attend = partial(attend, num_keys=num_keys)
    if segments is None:
        return attend(query, key, value)
    return _by_segment(attend, query, key, value, segments)


def check(implementation: Attention | None, head_dim: int, dtype: Any) -> None:
    """Raises ValueError when the `implementation` asked for cannot run such queries here: known before weights are."""
    if implementation is not None:
        _choose(jax.ShapeDtypeStruct((1, 1, 1, head_dim), dtype), implementation)


def _lengths(query: Array, num_keys: int | None) -> Array | None:
    return None if num_keys is None else jnp.full(query.shape[0], num_keys, jnp.int32)


def _cudnn(query: Array, key: Array, value: Array, num_keys: int | None = None) -> Array:
    lengths = _lengths(query, num_keys)
    return jax.nn.dot_product_attention(query, key, value, key_value_seq_lengths=lengths, implementation="cudnn")


def _pallas(query: Array, key: Array, value: Array, num_keys: int | None = None) -> Array:
    """Under a mesh (`jax.set_mesh`) each device runs the kernel on its samples and heads, if they divide."""

    def attend(query: Array, key: Array, value: Array) -> Array:
        return pallas.attention(query, key, value, _lengths(query, num_keys), implementation="pallas")

    mesh = jax.sharding.get_abstract_mesh()
    if mesh is None or mesh.empty or mesh.size == 1:
        return attend(query, key, value)
    samples = BATCH if query.shape[0] % math.prod(mesh.shape[axis] for axis in BATCH) == 0 else None
    heads = RULES["heads"] if query.shape[2] % mesh.shape[RULES["heads"]] == 0 else None
    split = PartitionSpec(samples, None, heads)
    return jax.shard_map(attend, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)(query, key, value)


def _choose(query: Array | jax.ShapeDtypeStruct, asked: Attention | None) -> Attention:
    reasons = {"xla": None, "cudnn": _no_cudnn(query), "pallas": pallas.unsupported(query)}
    if asked is not None:
        if reasons[asked]:
            raise ValueError(f"attention: {reasons[asked]}; leave attention out, or ask for 'xla'")
        return asked
    best: Any = choices.default("attention")
    if reasons[best] is None:
        _say(f"attention by {best} ({device.kind()})")
        return best
    _say(f"attention by xla ({device.kind()}): {reasons[best]}")
    return "xla"


def _no_cudnn(query: Array | jax.ShapeDtypeStruct) -> str | None:
    """The reason that cuDNN's attention cannot run here for such queries, or None."""
    if device.platform() != "gpu":
        return f"cuDNN runs on NVIDIA GPUs, and this is {device.platform()}"
    if query.dtype.itemsize != 2:
        return f"cuDNN's attention is for bfloat16 and float16, and the queries are {query.dtype}"
    if query.shape[-1] % 8 or query.shape[-1] > 128:
        return f"cuDNN's attention is for head_dim in multiples of 8 up to 128, not {query.shape[-1]}"
    return None


@cache
def _say(line: str) -> None:
    log.info(line)


def _xla(query: Array, key: Array, value: Array, num_keys: int | None = None) -> Array:
    key, value = key[:, :num_keys], value[:, :num_keys]
    # The choice falls while lowering, so a program compiled on a host for another platform gets that platform's.
    cache, memory = (partial(blockwise, block=block) for block in (CACHE, MEMORY))
    return jax.lax.platform_dependent(query, key, value, cpu=cache, default=memory)


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
