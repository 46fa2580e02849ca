"""Attention on TPUs: jax's splash attention, fed with padded, head-major arrays."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask import FullMask, MultiHeadMask
from jaxtyping import Array, Float, Int

from pallas_kernels.tiles import Tiles

LANES = 128


def attention(
    query: Float[Array, "b n heads head_dim"],
    key: Float[Array, "b m heads head_dim"],
    value: Float[Array, "b m heads head_dim"],
    key_lengths: Int[Array, " b"] | None,
    tiles: Tiles,
    *,
    interpret: bool = False,
) -> Float[Array, "b n heads head_dim"]:
    """`pallas_kernels.attention.reference`. Lengths are padded to blocks of at most `tiles["block_q"]` queries and
    `tiles["block_k"]` keys, multiplied `tiles["block_k_compute"]` at a time; padded keys are a segment of their own.
    """
    (b, n, heads, head_dim), m = query.shape, key.shape[1]
    block_q, block_k = block(n, tiles["block_q"]), block(m, tiles["block_k"])
    compute = max(c for c in range(LANES, block_k + 1, LANES) if block_k % c == 0 and c <= tiles["block_k_compute"])
    sizes = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_k,
        block_kv_compute=compute,
        block_q_dkv=block_q,
        block_kv_dkv=block_k,
        block_kv_dkv_compute=compute,
        use_fused_bwd_kernel=True,
    )
    query = _head_major((query.astype(jnp.float32) * head_dim**-0.5).astype(query.dtype), block_q)
    key, value = _head_major(key, block_k), _head_major(value, block_k)
    mask = MultiHeadMask([FullMask((query.shape[2], key.shape[2]))] * heads)
    kernel = splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)

    segments = None
    if key_lengths is not None or key.shape[2] != m:
        lengths = jnp.full((b,), m) if key_lengths is None else key_lengths
        hidden = (jnp.arange(key.shape[2]) >= lengths[:, None]).astype(jnp.int32)
        segments = splash.SegmentIds(jnp.zeros((b, query.shape[2]), jnp.int32), hidden)
    out: Array = jax.vmap(kernel)(query, key, value, segments)  # pyright: ignore[reportAssignmentType]
    return out[:, :, :n].transpose(0, 2, 1, 3)


def block(length: int, largest: int) -> int:
    """The multiple of 128 from `largest` / 2 to `largest` whose blocks pad `length` least; the larger of equals."""
    whole = -(-length // LANES) * LANES
    if whole <= largest:
        return whole
    return min(range(largest, largest // 2 - 1, -LANES), key=lambda size: -length % size)


def _head_major(x: Float[Array, "b n heads head_dim"], block: int) -> Float[Array, "b heads padded head_dim"]:
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % block), (0, 0), (0, 0)]).transpose(0, 2, 1, 3)
