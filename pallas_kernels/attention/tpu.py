"""Attention on TPUs: jax's splash attention on padded, head-major arrays."""

from collections.abc import Mapping
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
        residual_checkpoint_name=KEPT_ATTENTION,
        interpret=interpret,
    )

    segments = None
    if key_lengths is not None or key.shape[2] != m:
        lengths = jnp.full((b,), m) if key_lengths is None else key_lengths
        hidden = (jnp.arange(key.shape[2]) >= lengths[:, None]).astype(jnp.int32)
        segments = splash.SegmentIds(jnp.zeros((b, query.shape[2]), jnp.int32), hidden)
    out: Array = jax.vmap(kernel)(query, key, value, segments)  # pyright: ignore[reportAssignmentType]
    return out[:, :, :n].transpose(0, 2, 1, 3)


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


def _head_major(x: Float[Array, "b n heads head_dim"], block: int) -> Float[Array, "b heads padded head_dim"]:
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % block), (0, 0), (0, 0)]).transpose(0, 2, 1, 3)
