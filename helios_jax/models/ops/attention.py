"""Attention over [b, n, heads, head_dim], by one of three implementations."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from helios_jax.models.ops import choices, mesh_axes
from helios_jax.models.ops.blockwise import (
    CACHE,
    MEMORY,
    blockwise,
    blockwise_gradients,
    blockwise_with_log_sums,
)
from helios_jax.models.ops.choices import Attention
from helios_jax.models.ops.context_attention import Pieces, Present, ring, ulysses
from helios_jax.models.ops.token_runs import runs_of, take
from helios_jax.sharding import ContextAttention
from pallas_kernels import attention as pallas
from pallas_kernels.core import device

# The segment of each query and of each key, known when the program is compiled.
Segments = tuple[np.ndarray, np.ndarray]


def attention(
    query: Float[Array, "b n heads head_dim"],
    key: Float[Array, "b m heads head_dim"],
    value: Float[Array, "b m heads head_dim"],
    *,
    segments: Segments | None = None,
    num_keys: int | None = None,
    present: Present | None = None,
    context: ContextAttention = "ulysses",
    implementation: Attention | None = None,
) -> Float[Array, "b n heads head_dim"]:
    """softmax(query key^T / sqrt(head_dim)) value, every query seeing every key; the softmax is float32.

    With `num_keys`, queries see the first so many keys; the keys after them are padding.
    With `segments`, a query sees the keys of its own segment only: several sequences are packed into one. Each segment
    is computed separately, so that no work is spent on masked pairs.
    With `present`, the arrays are this device's share of tokens that are split over the mesh axis `context`. A query
    then sees the keys of all devices except padding, by the algorithm that the argument `context` names.
    Without `implementation`, the device's default runs (`choices`), or XLA if that cannot; the log says which.
    Raises ValueError if the implementation asked for cannot run.
    """
    if present is not None:
        attend = _by_context(query, context, implementation)
    else:
        attend = _IMPLEMENTATIONS[_choose(query, implementation)]
        if num_keys is not None and num_keys < key.shape[1]:
            attend = partial(attend, num_keys=num_keys)
    if segments is None:
        return attend(query, key, value, *(() if present is None else (present,)))
    return _by_segment(attend, query, key, value, segments, present)


def check(implementation: Attention | None, head_dim: int, dtype: Any, context: ContextAttention | None = None) -> None:
    """Raises ValueError if the `implementation` asked for cannot run such queries here, before weights are read.

    `context` is the algorithm for tokens that are split over devices, None where they are not.
    """
    if implementation is not None:
        choose = _choose_for_ring if context == "ring" else _choose
        choose(jax.ShapeDtypeStruct((1, 1, 1, head_dim), dtype), implementation)


def _by_context(query: Array, context: ContextAttention, asked: Attention | None) -> Callable[..., Array]:
    """Attention to the keys of all devices, as a function of this device's queries, keys, values and `present`."""
    if context == "ring":
        op: Callable[..., Array] = partial(ring, _PIECES[_choose_for_ring(query, asked)])
    else:
        op = partial(ulysses, _IMPLEMENTATIONS[_choose(query, asked)])

    def attend(query: Array, key: Array, value: Array, present: Present) -> Array:
        return _each_device(partial(op, present=present))(query, key, value)

    return attend


def _each_device(attend: Callable[..., Array]) -> Callable[..., Array]:
    """Makes each device run `attend` on its own samples and heads, if their numbers divide over the mesh."""

    def run(query: Array, key: Array, value: Array) -> Array:
        split = mesh_axes.heads_split(query.shape[0], query.shape[2])
        return mesh_axes.each_device(attend, split, split)(query, key, value)

    return run


def _lengths(query: Array, num_keys: int | None) -> Array | None:
    return None if num_keys is None else jnp.full(query.shape[0], num_keys, jnp.int32)


def _cudnn(query: Array, key: Array, value: Array, num_keys: int | None = None) -> Array:
    def attend(query: Array, key: Array, value: Array) -> Array:
        lengths = _lengths(query, num_keys)
        return jax.nn.dot_product_attention(query, key, value, key_value_seq_lengths=lengths, implementation="cudnn")

    return _each_device(attend)(query, key, value)


def _pallas(query: Array, key: Array, value: Array, num_keys: int | None = None) -> Array:
    def attend(query: Array, key: Array, value: Array) -> Array:
        return pallas.attention(query, key, value, _lengths(query, num_keys), implementation="pallas")

    return _each_device(attend)(query, key, value)


def _choose(query: Array | jax.ShapeDtypeStruct, asked: Attention | None) -> Attention:
    """The implementation `asked` for, or else the device's default, or else XLA. Raises ValueError as `attention`."""
    reasons = {"xla": None, "cudnn": _no_cudnn(query), "pallas": pallas.unsupported(query)}
    return _able("attention", asked, choices.default("attention"), reasons)


def _choose_for_ring(query: Array | jax.ShapeDtypeStruct, asked: Attention | None) -> Attention:
    """The implementation of attention to a piece of the keys; it must give log-sum-exps, by which pieces are merged."""
    reasons = {
        "xla": None,
        "cudnn": "cuDNN's attention has no gradient for a part of the keys, which a ring of devices needs",
        "pallas": pallas.unsupported(query),
    }
    best = choices.default("attention")
    if asked is None and best == "cudnn":
        best = "pallas"
        reasons[best] = _no_cudnn(query) or reasons[best]  # our kernel is slower than XLA where cuDNN cannot run
    return _able("attention around the ring", asked, best, reasons)


def _able(what: str, asked: Attention | None, best: Any, reasons: dict[str, str | None]) -> Attention:
    """The implementation `asked` for, or else the `best`, or XLA if that cannot run; `reasons` say why each cannot."""
    if asked is not None:
        if reasons[asked]:
            raise ValueError(f"attention: {reasons[asked]}; leave attention out, or ask for 'xla'")
        return asked
    if reasons[best] is None:
        choices.say(f"{what} by {best} ({device.kind()})")
        return best
    choices.say(f"{what} by xla ({device.kind()}): {reasons[best]}")
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


def _xla(query: Array, key: Array, value: Array, num_keys: int | None = None) -> Array:
    return _by_platform(blockwise, query, key[:, :num_keys], value[:, :num_keys])


def _by_platform(op: Callable[..., Any], *arrays: Array) -> Any:
    """Runs `op` with the block size for the device that the program is compiled for."""
    # The branch is chosen when the program is lowered, so that cross-compilation for another platform works.
    cache, memory = (partial(op, block=block) for block in (CACHE, MEMORY))
    return jax.lax.platform_dependent(*arrays, cpu=cache, default=memory)


_IMPLEMENTATIONS: dict[Attention, Callable[..., Array]] = {"xla": _xla, "cudnn": _cudnn, "pallas": _pallas}


def _with_length(op: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel's `op`, which takes a length per sample, as a function that takes one for all samples."""
    return lambda query, *rest: op(query, *rest[:-1], jnp.full(query.shape[0], rest[-1], jnp.int32))


_PIECES: dict[Attention, Pieces] = {
    "xla": Pieces(partial(_by_platform, blockwise_with_log_sums), partial(_by_platform, blockwise_gradients)),
    "pallas": Pieces(_with_length(pallas.with_log_sums), _with_length(pallas.gradients)),
}


def _by_segment(
    attend: Callable[..., Array], query: Array, key: Array, value: Array, segments: Segments, present: Present | None
) -> Array:
    parts: list[tuple[int, Array]] = []  # (first token, outputs) of each run of tokens of one segment
    for segment in np.unique(segments[0]):
        query_runs, key_runs = (runs_of(ids == segment) for ids in segments)
        mine = () if present is None else (present[:, segments[1] == segment],)
        out = attend(take(query, query_runs), take(key, key_runs), take(value, key_runs), *mine)
        ends = np.cumsum([stop - start for start, stop in query_runs])
        parts += [(start, run) for (start, _), run in zip(query_runs, jnp.split(out, ends[:-1], 1))]
    return jnp.concatenate([part for _, part in sorted(parts, key=lambda part: part[0])], 1)
