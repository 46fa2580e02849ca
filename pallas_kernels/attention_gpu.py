"""Attention on Hopper GPUs in Mosaic GPU, after FlashAttention-3 (arXiv 2407.08608).

A block of the grid has two warpgroups that compute, each for rows of its own, and one that copies the keys and values
that both read into a ring of slots in shared memory. Tensor cores multiply from there (`wgmma`); sums and the softmax
stay in float32 registers. A length need be a multiple of nothing: what is copied from beyond an end is zeros, and the
output has room for whole tiles.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as gpu
from jaxtyping import Array, Float, Int

from pallas_kernels.tiles import Tiles

GROUPS = 2  # warpgroups that compute
TILED = (gpu.TilingTransform((8, 64)), gpu.SwizzleTransform(128))  # how wgmma reads 16-bit tiles


def attention(
    query: Float[Array, "b n heads head_dim"],
    key: Float[Array, "b m heads head_dim"],
    value: Float[Array, "b m heads head_dim"],
    key_lengths: Int[Array, " b"] | None,
    tiles: Tiles,
    *,
    interpret: Any = None,
) -> Float[Array, "b n heads head_dim"]:
    """`pallas_kernels.attention.reference` of bfloat16. A warpgroup has `tiles["block_q"]` queries, a slot
    `tiles["block_k"]` keys, and there are `tiles["slots"]` slots.

    Raises:
        NotImplementedError: a gradient is asked for.
    """

    @jax.custom_vjp
    def forward(query: Array, key: Array, value: Array) -> Array:
        return _forward(query, key, value, key_lengths, tiles, interpret)

    def no_gradient(*_: Array) -> Any:
        raise NotImplementedError("Pallas attention on a GPU has no gradient; implementation='cudnn' has")

    forward.defvjp(no_gradient, no_gradient)
    return forward(query, key, value)


def _forward(query: Array, key: Array, value: Array, key_lengths: Array | None, tiles: Tiles, interpret: Any) -> Array:
    (b, n, heads, head_dim), m = query.shape, key.shape[1]
    rows, columns = tiles["block_q"], tiles["block_k"]
    slots, tile_count = min(tiles["slots"], pl.cdiv(m, columns)), pl.cdiv(n, GROUPS * rows)
    lengths = jnp.full((b,), m, jnp.int32) if key_lengths is None else key_lengths.astype(jnp.int32)

    def tile(slots: int, size: int) -> Any:
        return gpu.SMEM((slots, size, head_dim), query.dtype, transforms=TILED)

    out = gpu.kernel(
        partial(_kernel, interpret=interpret is not None),
        out_type=jax.ShapeDtypeStruct((b, tile_count * GROUPS * rows, heads, head_dim), query.dtype),
        grid=(heads, tile_count, b),
        grid_names=("head", "tile", "sample"),
        num_threads=GROUPS + 1,
        thread_name="group",
        scratch_types=dict(
            query_tile=tile(GROUPS, rows),
            key_tiles=tile(slots, columns),
            value_tiles=tile(slots, columns),
            query_in=gpu.Barrier(num_barriers=GROUPS),
            key_in=gpu.Barrier(num_barriers=slots),
            value_in=gpu.Barrier(num_barriers=slots),
            key_free=gpu.Barrier(num_arrivals=GROUPS, num_barriers=slots),
            value_free=gpu.Barrier(num_arrivals=GROUPS, num_barriers=slots),
        ),
        compiler_params=gpu.CompilerParams(approx_math=True),
        **({} if interpret is None else {"interpret": interpret}),
    )(query, key, value, lengths)
    return out[:, :n]


def _kernel(
    query, key, value, lengths, out, query_tile, key_tiles, value_tiles, query_in, key_in, value_in, key_free,
    value_free, *, interpret: bool,
):  # fmt: skip
    head, tile, sample, group = (lax.axis_index(name) for name in ("head", "tile", "sample", "group"))
    (_, rows, head_dim), (slots, columns, _) = query_tile.shape, key_tiles.shape
    length = lengths[sample]
    steps = pl.cdiv(length, columns)

    def laid(x: Array, layout: Any) -> Array:
        return x if interpret else gpu.layout_cast(x, layout)

    multiply = _interpreted_multiply if interpret else _multiply

    def column_numbers() -> Array:
        if interpret:
            return lax.broadcasted_iota(jnp.int32, (rows, columns), 1)
        return gpu.broadcasted_iota(jnp.int32, (rows, columns), 1, layout=gpu.Layout.WGMMA)

    @pl.when(group < GROUPS)
    def compute():
        gpu.set_max_registers(232, action="increase")
        mine = pl.ds((tile * GROUPS + group) * rows, rows)
        gpu.copy_gmem_to_smem(query.at[sample, mine, head], query_tile.at[group], query_in.at[group])
        gpu.barrier_wait(query_in.at[group])

        def step(i, carry):
            total, top, norm = carry
            slot = lax.rem(i, jnp.array(slots, i.dtype))
            gpu.barrier_wait(key_in.at[slot])
            logits = multiply(query_tile.at[group], key_tiles.at[slot], transposed=True)
            gpu.barrier_arrive(key_free.at[slot])
            logits *= head_dim**-0.5 * math.log2(math.e)  # exp2 is what the hardware has

            def hide(logits):
                return jnp.where(column_numbers() + i * columns < length, logits, -jnp.inf)

            logits = lax.cond((i + 1) * columns > length, hide, lambda logits: logits, logits)
            new_top = jnp.maximum(top, logits.max(axis=1))
            shrink = jnp.exp2(top - new_top)
            weights = jnp.exp2(logits - lax.broadcast_in_dim(new_top, logits.shape, [0]))
            norm = norm * shrink + weights.sum(axis=1)
            gpu.barrier_wait(value_in.at[slot])
            part = multiply(weights.astype(value_tiles.dtype), value_tiles.at[slot])
            gpu.barrier_arrive(value_free.at[slot])
            return total * lax.broadcast_in_dim(shrink, total.shape, [0]) + part, new_top, norm

        wgmma = gpu.Layout.WGMMA
        start = (
            laid(jnp.zeros((rows, head_dim), jnp.float32), wgmma),
            laid(jnp.full((rows,), -jnp.inf, jnp.float32), wgmma.reduce(1)),
            laid(jnp.zeros((rows,), jnp.float32), wgmma.reduce(1)),
        )
        total, _, norm = lax.fori_loop(0, steps, step, start)
        query_tile[group] = (total / lax.broadcast_in_dim(norm, total.shape, [0])).astype(query_tile.dtype)
        gpu.commit_smem()
        gpu.copy_smem_to_gmem(query_tile.at[group], out.at[sample, mine, head])
        gpu.wait_smem_to_gmem(0)

    @pl.when(group == GROUPS)
    def copy():
        gpu.set_max_registers(40, action="decrease")

        def step(i, _):
            slot = lax.rem(i, jnp.array(slots, i.dtype))
            there = (sample, pl.ds(i * columns, columns), head)
            pl.when(i >= slots)(lambda: gpu.barrier_wait(key_free.at[slot]))
            gpu.copy_gmem_to_smem(key.at[there], key_tiles.at[slot], key_in.at[slot])
            pl.when(i >= slots)(lambda: gpu.barrier_wait(value_free.at[slot]))
            gpu.copy_gmem_to_smem(value.at[there], value_tiles.at[slot], value_in.at[slot])

        def drain(i, _):
            slot = lax.rem(i, jnp.array(slots, i.dtype))
            gpu.barrier_wait(key_free.at[slot])
            gpu.barrier_wait(value_free.at[slot])

        lax.fori_loop(0, steps, step, None)
        lax.fori_loop(jnp.maximum(steps - slots, 0), steps, drain, None)  # no barrier ends unobserved


def _multiply(a: Any, b: Any, *, transposed: bool = False) -> Array:
    """a (in shared memory or registers) @ b (in shared memory, or its transpose), in float32 registers."""

    def run(accumulator):
        gpu.wgmma(accumulator, a, gpu.transpose_ref(b, (1, 0)) if transposed else b)
        return accumulator[...]

    return pl.run_scoped(run, gpu.ACC((a.shape[0], b.shape[0 if transposed else 1]), jnp.float32))


def _interpreted_multiply(a: Any, b: Any, *, transposed: bool = False) -> Array:
    """`_multiply` where Mosaic GPU is interpreted, which knows no transposed operands."""
    return jnp.dot(a[...], b[...].T if transposed else b[...], preferred_element_type=jnp.float32)
