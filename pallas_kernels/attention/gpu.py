"""Attention on Hopper GPUs in Mosaic GPU, after FlashAttention-3 (arXiv 2407.08608).

A block of the grid has two warpgroups that compute, each for its own rows, and one that copies keys and values for
both into a ring of slots in shared memory. Tensor cores read them from there (`wgmma`); sums and the softmax stay in
float32 registers. Tiles need not divide a length: TMA reads zeros beyond an end and drops writes there. The gradient
is in `gpu_backward`.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as gpu
from jaxtyping import Array, Float, Int

from pallas_kernels.attention import hopper, parts
from pallas_kernels.attention.gpu_backward import key_value_gradients, query_gradient
from pallas_kernels.attention.hopper import GROUPS, Dialect, Ring
from pallas_kernels.attention.residuals import KEPT_ATTENTION
from pallas_kernels.core.tiles import Tiles

LOWEST = -1e30  # log-sum of a row without keys: finite, because log-sums are subtracted from one another
OPS = ("attention", "attention_dq", "attention_dkv")


def tables(dtype: Any) -> dict[str, str]:
    """The entry of tiles.json with the sizes of each of `OPS`."""
    return {op: op + "_float32" * (dtype == jnp.float32) for op in OPS}


def attention(
    query: Float[Array, "b n heads head_dim"],
    key: Float[Array, "b m heads head_dim"],
    value: Float[Array, "b m heads head_dim"],
    key_lengths: Int[Array, " b"] | None,
    tiles: Mapping[str, Tiles],
    *,
    interpret: Any = None,
) -> Float[Array, "b n heads head_dim"]:
    """`pallas_kernels.attention.reference` of bfloat16 or float32, with its gradients.

    `tiles` has sizes for each of `OPS`: a warpgroup has `block_q` queries, a slot has `block_k` keys, and there are
    `slots` slots. For the gradients of keys and values ("attention_dkv") a warpgroup has `block_k` keys and a slot has
    `block_q` queries.
    """
    n, m = query.shape[1], key.shape[1]
    lengths = jnp.full((query.shape[0],), m, jnp.int32) if key_lengths is None else key_lengths.astype(jnp.int32)
    query, key, value = (hopper.padded(x) for x in (query, key, value))

    @jax.custom_vjp
    def attend(query: Array, key: Array, value: Array, lengths: Array) -> Array:
        return forward(query, key, value, lengths, tiles["attention"], log_sums=False, interpret=interpret)[0]

    def keep(query: Array, key: Array, value: Array, lengths: Array) -> tuple[Array, Any]:
        made = forward(query, key, value, lengths, tiles["attention"], log_sums=True, interpret=interpret)
        out, sums = (checkpoint_name(x, KEPT_ATTENTION) for x in made)
        return out, (query, key, value, lengths, out, sums)

    def backward(kept: Any, cotangent: Array) -> tuple[Array | None, ...]:
        query, key, value, lengths, out, sums = kept
        dots = jnp.einsum("bnhd,bnhd->bhn", out, cotangent, precision="highest", preferred_element_type=jnp.float32)
        arrays = (query, key, value, cotangent.astype(query.dtype), sums, dots, lengths)
        d_query = query_gradient(*arrays, tiles["attention_dq"], interpret=interpret)
        return d_query, *key_value_gradients(*arrays, tiles["attention_dkv"], interpret=interpret), None

    attend.defvjp(keep, backward)
    return attend(query, key, value, lengths)[:, :n]


def with_log_sums(
    query: Float[Array, "b n heads head_dim"],
    key: Float[Array, "b m heads head_dim"],
    value: Float[Array, "b m heads head_dim"],
    key_lengths: Int[Array, " b"],
    tiles: Mapping[str, Tiles],
    *,
    interpret: Any = None,
) -> tuple[Float[Array, "b n heads head_dim"], Float[Array, "b heads n"]]:
    """`attention`, and log(sum(exp(logits))) of each query and head; without gradients.

    The log-sum of a row without keys is so low that a merge with other keys ignores it.
    """
    n, (query, key, value) = query.shape[1], (hopper.padded(x) for x in (query, key, value))
    lengths = jnp.maximum(key_lengths, 1).astype(jnp.int32)
    out, sums = forward(query, key, value, lengths, tiles["attention"], log_sums=True, interpret=interpret)
    sums = jnp.where(key_lengths[:, None, None] > 0, sums[:, :, :n] * math.log(2), LOWEST)
    return out[:, :n], sums


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
    interpret: Any = None,
) -> tuple[Float[Array, "b n heads head_dim"], Float[Array, "b m heads head_dim"], Float[Array, "b m heads head_dim"]]:
    """Gradients of queries, keys and values for one piece of the keys that the queries see."""
    n, m = query.shape[1], key.shape[1]
    q, k, v, cotangent = (hopper.padded(x) for x in (query, key, value, cotangent.astype(query.dtype)))
    sums, dots = (jnp.pad(x, [(0, 0), (0, 0), (0, -n % hopper.ROWS)]) for x in (log_sums / math.log(2), dots))
    arrays = (q, k, v, cotangent, sums, dots, jnp.maximum(key_lengths, 1).astype(jnp.int32))
    d_query = query_gradient(*arrays, tiles["attention_dq"], interpret=interpret)
    others = key_value_gradients(*arrays, tiles["attention_dkv"], interpret=interpret)
    seen = key_lengths[:, None, None, None] > 0
    d_query, d_key, d_value = (jnp.where(seen, x, jnp.zeros((), x.dtype)) for x in (d_query, *others))
    return d_query[:, :n], d_key[:, :m], d_value[:, :m]


def forward(
    query: Array, key: Array, value: Array, lengths: Array, tiles: Tiles, *, log_sums: bool, interpret: Any = None
) -> tuple[Array, ...]:
    """Attention's values and, if asked for, log2(sum of exp(logits)) of each row, float32 [b, heads, padded n].

    The numbers of queries and keys are multiples of `hopper.ROWS`.
    """
    (b, n, heads, head_dim), m, dtype = query.shape, key.shape[1], query.dtype
    count, rows, columns = parts.COUNT[dtype], tiles["block_q"], tiles["block_k"]
    slots, tile_count = min(tiles["slots"], pl.cdiv(m, columns)), pl.cdiv(n, GROUPS * rows)
    query, key, value = (parts.split(x) for x in (query, key, value))
    out = [jax.ShapeDtypeStruct((b, hopper.room(n, GROUPS * rows, interpret), *query.shape[2:]), query.dtype)]
    slot = hopper.matrices(count, (columns, head_dim), columns)
    scratch: dict[str, Any] = dict(
        query_tiles=hopper.matrices(count, (GROUPS, rows, head_dim), columns),
        query_in=gpu.Barrier(num_arrivals=count, num_barriers=GROUPS),
        turn=gpu.Barrier(num_arrivals=GROUPS),
        keys=hopper.ring(slots, slot),
        values=hopper.ring(slots, slot),
    )
    if log_sums:
        out.append(jax.ShapeDtypeStruct((b, heads, tile_count * GROUPS * rows), jnp.float32))
        scratch["sum_tiles"] = gpu.SMEM((GROUPS, rows), jnp.float32)
    grid = (heads, tile_count, b)
    got = hopper.launch(
        _kernel, (query, key, value, lengths), tuple(out), grid=grid, scratch=scratch, interpret=interpret
    )
    return parts.joined(got[0][:, :n], dtype), *got[1:]


def _kernel(
    query, key, value, lengths, out, *sums, query_tiles, query_in, turn, keys: Ring, values: Ring,
    sum_tiles: Any = None, say: Dialect,
):  # fmt: skip
    head, tile, sample, group = (lax.axis_index(name) for name in ("head", "tile", "sample", "group"))
    count, (_, rows, head_dim), columns = len(query_tiles), query_tiles[0].shape, keys.tiles[0].shape[1]
    length = lengths[sample]
    steps = pl.cdiv(length, columns)

    def take_turns():
        gpu.barrier_arrive(turn)
        gpu.barrier_wait(turn)

    @pl.when(group < GROUPS)
    def compute():
        gpu.set_max_registers(232, action="increase")
        mine = pl.ds((tile * GROUPS + group) * rows, rows)
        query_tile = hopper.at(query_tiles, group)
        hopper.load(hopper.of_head(query, sample, mine, head), query_tile, query_in.at[group])
        gpu.barrier_wait(query_in.at[group])
        # The groups take turns: one group's products run while the other computes a softmax.
        pl.when(group == 1)(take_turns)

        def step(i, carry):
            total, top, norm = carry
            logits = say.product(query_tile, say.transposed(hopper.wait(keys, i)), take_turns)
            hopper.done(keys, i)
            logits = hopper.hide(say, logits * hopper.exponent(head_dim), i * columns, length)
            new_top = jnp.maximum(top, logits.max(axis=1))
            shrink = jnp.exp2(top - new_top)
            weights = jnp.exp2(logits - lax.broadcast_in_dim(new_top, logits.shape, [0]))
            norm = norm * shrink + weights.sum(axis=1)
            total *= lax.broadcast_in_dim(shrink, total.shape, [0])
            total, norm, new_top, weights = lax.optimization_barrier((total, norm, new_top, parts.of(weights, count)))
            value_tile = hopper.wait(values, i)
            take_turns()
            (total,) = say.add_products((total, weights, value_tile))
            hopper.done(values, i)
            return total, new_top, norm

        start = say.zeros((rows, head_dim)), say.zeros((rows,)) - jnp.inf, say.zeros((rows,))
        total, top, norm = lax.fori_loop(0, steps, step, start)
        pl.when(group == 0)(take_turns)
        hopper.store(total / lax.broadcast_in_dim(norm, total.shape, [0]), query_tile)
        if sums:
            sum_tiles[group] = top + jnp.log(norm) * math.log2(math.e)
        gpu.commit_smem()
        hopper.save(query_tile, hopper.of_head(out, sample, mine, head))
        if sums:
            gpu.copy_smem_to_gmem(sum_tiles.at[group], sums[0].at[sample, head, mine])
        gpu.wait_smem_to_gmem(0)

    @pl.when(group == GROUPS)
    def copy():
        gpu.set_max_registers(40, action="decrease")
        hopper.fill(
            steps,
            (keys, lambda i: hopper.of_head(key, sample, pl.ds(i * columns, columns), head)),
            (values, lambda i: hopper.of_head(value, sample, pl.ds(i * columns, columns), head)),
        )
