"""Attention on TPUs: jax's splash attention on padded, head-major arrays."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask import FullMask, MultiHeadMask
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.residuals import KEPT_ATTENTION
from pallas_kernels.core.tiles import Tiles

OPS = ("attention", "attention_dkv")  # the backward kernel also computes the queries' gradient
LANES = 128


def tables(dtype: Any) -> dict[str, str]:
    """The entry of tiles.json with the sizes of each of `OPS`; one for all dtypes."""
    return {op: op for op in OPS}


def attention(
    query: Float[Array, "b n heads head_dim"],
    key: Float[Array, "b m heads head_dim"],
    value: Float[Array, "b m heads head_dim"],
    key_lengths: Int[Array, " b"] | None,
    tiles: Mapping[str, Tiles],
    *,
    interpret: bool = False,
) -> Float[Array, "b n heads head_dim"]:
    """`pallas_kernels.attention.reference` with blocks from `tiles`, which has sizes for each of `OPS`.

    Lengths are padded to blocks of at most `block_q` queries and `block_k` keys, multiplied `block_k_compute` at a
    time. Padded keys form a segment of their own.
    """
    kernel, inputs = _prepared(query, key, value, key_lengths, tiles, interpret=interpret)
    out: Array = jax.vmap(kernel)(*inputs)  # pyright: ignore[reportAssignmentType]
    return _tokens(out, query.shape[1])


def with_log_sums(
    query: Float[Array, "b n heads head_dim"],
    key: Float[Array, "b m heads head_dim"],
    value: Float[Array, "b m heads head_dim"],
    key_lengths: Int[Array, " b"],
    tiles: Mapping[str, Tiles],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "b n heads head_dim"], Float[Array, "b heads n"]]:
    """`attention`, and log(sum(exp(logits))) of each query and head; without gradients."""
    kernel, inputs = _prepared(query, key, value, key_lengths, tiles, save_residuals=True, interpret=interpret)
    out, (log_sums,) = jax.vmap(kernel)(*inputs)
    return _tokens(out, query.shape[1]), log_sums[:, :, : query.shape[1]]


def gradients(
    query: Float[Array, "b n heads head_dim"],
    key: Float[Array, "b m heads head_dim"],
    value: Float[Array, "b m heads head_dim"],
    cotangent: Float[Array, "b n heads head_dim"],
    log_sums: Float[Array, "b heads n"],
    dots: Float[Array, "b heads n"],
    key_lengths: Int[Array, " b"],
    tiles: Mapping[str, Tiles],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "b n heads head_dim"], Float[Array, "b m heads head_dim"], Float[Array, "b m heads head_dim"]]:
    """Gradients of queries, keys and values for one piece of the keys that the queries see.

    Calls splash attention's backward kernel, which is private to jax: the public gradient assumes that there are no
    other keys.
    """
    (_, n, _, head_dim), m = query.shape, key.shape[1]
    kernel, (q, k, v, segments) = _prepared(query, key, value, key_lengths, tiles, interpret=interpret)
    options, sizes = kernel.kwargs, _sizes(n, m, tiles)
    backward = partial(
        splash._splash_attention_bwd_dkv,
        bq=sizes.block_q_dkv,
        bkv=sizes.block_kv_dkv,
        bkv_compute=sizes.block_kv_dkv_compute,
        mask_info=kernel.dkv_mask_info,
        use_fused_bwd_kernel=True,
        q_layout=sizes.q_layout,
        k_layout=sizes.k_layout,
        v_layout=sizes.v_layout,
        **{name: options[name] for name in ("is_mqa", "mask_value", "attn_logits_soft_cap", "mask_function")},
        interpret=interpret,
    )

    def of_sample(q, k, v, segments, log_sums, cotangent, dots):
        return backward(q, k, v, segments, None, log_sums, cotangent, dots)

    more = [(0, 0), (0, 0), (0, q.shape[2] - n)]
    log_sums, dots = jnp.pad(log_sums, more), jnp.pad(dots, more)
    cotangent = _head_major(cotangent.astype(query.dtype), sizes.block_q)
    made: Any = jax.vmap(of_sample)(q, k, v, segments, log_sums, cotangent, dots)
    d_query, d_key, d_value = made
    return _tokens(d_query, n) * head_dim**-0.5, _tokens(d_key, m), _tokens(d_value, m)


def _prepared(
    query: Array,
    key: Array,
    value: Array,
    key_lengths: Array | None,
    tiles: Mapping[str, Tiles],
    *,
    save_residuals: bool = False,
    interpret: bool,
) -> tuple[Any, tuple[Any, ...]]:
    """(splash attention's kernel, its inputs for each sample: padded queries, keys and values, segments)."""
    (b, n, heads, head_dim), m = query.shape, key.shape[1]
    sizes = _sizes(n, m, tiles)
    query = _head_major((query.astype(jnp.float32) * head_dim**-0.5).astype(query.dtype), sizes.block_q)
    key, value = _head_major(key, sizes.block_kv), _head_major(value, sizes.block_kv)
    mask = MultiHeadMask([FullMask((query.shape[2], key.shape[2]))] * heads)
    kernel = splash.make_splash_mha(
        mask,
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=None if save_residuals else KEPT_ATTENTION,  # of pieces, the merged result is kept
        save_residuals=save_residuals,
        interpret=interpret,
    )
    segments = None
    if key_lengths is not None or key.shape[2] != m:
        lengths = jnp.full((b,), m) if key_lengths is None else key_lengths
        hidden = (jnp.arange(key.shape[2]) >= lengths[:, None]).astype(jnp.int32)
        segments = splash.SegmentIds(jnp.zeros((b, query.shape[2]), jnp.int32), hidden)
    return kernel, (query, key, value, segments)


def _sizes(n: int, m: int, tiles: Mapping[str, Tiles]) -> splash.BlockSizes:
    forward, backward = (tiles[op] for op in OPS)
    block_q, block_k = block(n, forward["block_q"]), block(m, forward["block_k"])
    # The backward kernel's blocks must divide the lengths that the forward kernel's blocks pad to.
    block_q_dkv = _divisor(n + -n % block_q, backward["block_q"])
    block_k_dkv = _divisor(m + -m % block_k, backward["block_k"])
    return splash.BlockSizes(
        block_q=block_q,
        block_kv=block_k,
        block_kv_compute=_divisor(block_k, forward["block_k_compute"]),
        block_q_dkv=block_q_dkv,
        block_kv_dkv=block_k_dkv,
        block_kv_dkv_compute=_divisor(block_k_dkv, backward["block_k_compute"]),
        use_fused_bwd_kernel=True,
    )


def _divisor(whole: int, largest: int) -> int:
    """The largest multiple of 128 up to `largest` that divides `whole`."""
    return max(size for size in range(LANES, min(whole, largest) + 1, LANES) if whole % size == 0)


def block(length: int, largest: int) -> int:
    """The multiple of 128 from `largest` / 2 to `largest` whose blocks pad `length` least; the largest on a tie."""
    whole = -(-length // LANES) * LANES
    if whole <= largest:
        return whole
    return min(range(largest, largest // 2 - 1, -LANES), key=lambda size: -length % size)


def _tokens(x: Float[Array, "b heads padded head_dim"], n: int) -> Float[Array, "b n heads head_dim"]:
    return x[:, :, :n].transpose(0, 2, 1, 3)


def _head_major(x: Float[Array, "b n heads head_dim"], block: int) -> Float[Array, "b heads padded head_dim"]:
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % block), (0, 0), (0, 0)]).transpose(0, 2, 1, 3)
