"""The gradient of attention on Hopper GPUs: one kernel for the queries, one for the keys and values.

As in FlashAttention-3 (arXiv 2407.08608, appendix B.1), a row's softmax is exp2(logits - sum) with the sum from the
forward pass. Its gradient also needs dots = out . cotangent of the row. The gradients of queries and keys add up along
different axes. Two kernels need seven products where one would need five, but no atomic sums, and the result is the
same every time. Rows beyond the last query are copied as zeros, with zero cotangents, sums and dots, and add nothing
to a gradient.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as gpu
from jaxtyping import Array

from pallas_kernels.attention import hopper, parts
from pallas_kernels.attention.hopper import GROUPS, Dialect, Ring
from pallas_kernels.core.tiles import Tiles


def query_gradient(
    query: Array,
    key: Array,
    value: Array,
    cotangent: Array,
    sums: Array,
    dots: Array,
    lengths: Array,
    tiles: Tiles,
    *,
    interpret: Any = None,
) -> Array:
    """The gradient of the queries: a warpgroup has `block_q` queries and a slot `block_k` keys."""
    (b, n, heads, head_dim), m, dtype = query.shape, key.shape[1], query.dtype
    count, rows, columns = parts.COUNT[dtype], tiles["block_q"], tiles["block_k"]
    slots, tile_count = min(tiles["slots"], pl.cdiv(m, columns)), pl.cdiv(n, GROUPS * rows)
    query, key, value, cotangent = (parts.split(x) for x in (query, key, value, cotangent))
    matrix = hopper.matrices(count, (GROUPS, rows, head_dim), columns)
    slot = hopper.matrices(count, (columns, head_dim), columns)
    (gradient,) = hopper.launch(
        _query_kernel,
        (query, key, value, cotangent, sums, dots, lengths),
        (jax.ShapeDtypeStruct((b, hopper.room(n, GROUPS * rows, interpret), *query.shape[2:]), query.dtype),),
        grid=(heads, tile_count, b),
        scratch=dict(
            query_tiles=matrix,
            cotangent_tiles=matrix,
            sum_tiles=gpu.SMEM((GROUPS, rows), jnp.float32),
            dot_tiles=gpu.SMEM((GROUPS, rows), jnp.float32),
            loaded=gpu.Barrier(num_arrivals=2 * count + 2, num_barriers=GROUPS),
            keys=hopper.ring(slots, slot),
            values=hopper.ring(slots, slot),
        ),
        interpret=interpret,
    )
    return parts.joined(gradient[:, :n], dtype)


def _query_kernel(
    query, key, value, cotangent, sums, dots, lengths, out, *, query_tiles, cotangent_tiles, sum_tiles, dot_tiles,
    loaded, keys: Ring, values: Ring, say: Dialect,
):  # fmt: skip
    head, tile, sample, group = (lax.axis_index(name) for name in ("head", "tile", "sample", "group"))
    count, (_, rows, head_dim), columns = len(query_tiles), query_tiles[0].shape, keys.tiles[0].shape[1]
    length = lengths[sample]
    steps = pl.cdiv(length, columns)

    @pl.when(group < GROUPS)
    def compute():
        gpu.set_max_registers(232, action="increase")
        mine = pl.ds((tile * GROUPS + group) * rows, rows)
        query_tile, cotangent_tile = hopper.at(query_tiles, group), hopper.at(cotangent_tiles, group)
        hopper.load(hopper.of_head(query, sample, mine, head), query_tile, loaded.at[group])
        hopper.load(hopper.of_head(cotangent, sample, mine, head), cotangent_tile, loaded.at[group])
        gpu.copy_gmem_to_smem(sums.at[sample, head, mine], sum_tiles.at[group], loaded.at[group])
        gpu.copy_gmem_to_smem(dots.at[sample, head, mine], dot_tiles.at[group], loaded.at[group])
        gpu.barrier_wait(loaded.at[group])
        row_sums, row_dots = say.vector(sum_tiles.at[group], 0), say.vector(dot_tiles.at[group], 0)

        def step(i, total):
            key_tile = hopper.wait(keys, i)
            logits = say.product(query_tile, say.transposed(key_tile)) * hopper.exponent(head_dim)
            logits = hopper.hide(say, logits, i * columns, length)
            weights = jnp.exp2(logits - lax.broadcast_in_dim(row_sums, logits.shape, [0]))
            slopes = say.product(cotangent_tile, say.transposed(hopper.wait(values, i)))
            hopper.done(values, i)
            slopes = weights * (slopes - lax.broadcast_in_dim(row_dots, slopes.shape, [0]))
            (total,) = say.add_products((total, parts.of(slopes, count), key_tile))
            hopper.done(keys, i)
            return total

        total = lax.fori_loop(0, steps, step, say.zeros((rows, head_dim)))
        hopper.store(total * head_dim**-0.5, query_tile)
        gpu.commit_smem()
        hopper.save(query_tile, hopper.of_head(out, sample, mine, head))
        gpu.wait_smem_to_gmem(0)

    @pl.when(group == GROUPS)
    def copy():
        gpu.set_max_registers(40, action="decrease")
        hopper.fill(
            steps,
            (keys, lambda i: hopper.of_head(key, sample, pl.ds(i * columns, columns), head)),
            (values, lambda i: hopper.of_head(value, sample, pl.ds(i * columns, columns), head)),
        )


def key_value_gradients(
    query: Array,
    key: Array,
    value: Array,
    cotangent: Array,
    sums: Array,
    dots: Array,
    lengths: Array,
    tiles: Tiles,
    *,
    interpret: Any = None,
) -> tuple[Array, Array]:
    """The gradients of the keys and values: a warpgroup has `block_k` keys and a slot `block_q` queries."""
    (b, n, heads, head_dim), m, dtype = query.shape, key.shape[1], key.dtype
    count, rows, columns = parts.COUNT[dtype], tiles["block_k"], tiles["block_q"]
    slots, tile_count = min(tiles["slots"], pl.cdiv(n, columns)), pl.cdiv(m, GROUPS * rows)
    query, key, value, cotangent = (parts.split(x) for x in (query, key, value, cotangent))
    matrix = hopper.matrices(count, (GROUPS, rows, head_dim), columns)
    slot = hopper.matrices(count, (columns, head_dim), columns)
    numbers = (gpu.SMEM((max(columns, hopper.VECTOR),), jnp.float32),)
    out = jax.ShapeDtypeStruct((b, hopper.room(m, GROUPS * rows, interpret), *key.shape[2:]), key.dtype)
    d_key, d_value = hopper.launch(
        _key_value_kernel,
        (query, key, value, cotangent, sums, dots, lengths),
        (out, out),
        grid=(heads, tile_count, b),
        scratch=dict(
            key_tiles=matrix,
            value_tiles=matrix,
            loaded=gpu.Barrier(num_arrivals=2 * count, num_barriers=GROUPS),
            queries=hopper.ring(slots, slot),
            cotangents=hopper.ring(slots, slot),
            row_sums=hopper.ring(slots, numbers),
            row_dots=hopper.ring(slots, numbers),
        ),
        interpret=interpret,
    )
    return parts.joined(d_key[:, :m], dtype), parts.joined(d_value[:, :m], dtype)


def _key_value_kernel(
    query, key, value, cotangent, sums, dots, lengths, key_out, value_out, *, key_tiles, value_tiles, loaded,
    queries: Ring, cotangents: Ring, row_sums: Ring, row_dots: Ring, say: Dialect,
):  # fmt: skip
    """Logits, and arrays of their shape, are transposed here: one row per key, one column per query."""
    head, tile, sample, group = (lax.axis_index(name) for name in ("head", "tile", "sample", "group"))
    count, (_, rows, head_dim), columns = len(key_tiles), key_tiles[0].shape, queries.tiles[0].shape[1]
    length = lengths[sample]
    # For a tile of hidden keys only, the gradients stay at their initial zeros.
    steps = jnp.where(tile * GROUPS * rows < length, pl.cdiv(query.shape[1], columns), 0)

    @pl.when(group < GROUPS)
    def compute():
        gpu.set_max_registers(232, action="increase")
        first = (tile * GROUPS + group) * rows
        mine = pl.ds(first, rows)
        key_tile, value_tile = hopper.at(key_tiles, group), hopper.at(value_tiles, group)
        hopper.load(hopper.of_head(key, sample, mine, head), key_tile, loaded.at[group])
        hopper.load(hopper.of_head(value, sample, mine, head), value_tile, loaded.at[group])
        gpu.barrier_wait(loaded.at[group])

        def step(i, totals):
            d_key, d_value = totals
            query_tile = hopper.wait(queries, i)
            logits = say.product(key_tile, say.transposed(query_tile)) * hopper.exponent(head_dim)
            column_sums = say.vector(hopper.wait(row_sums, i)[0].at[:columns], 1)
            hopper.done(row_sums, i)
            weights = jnp.exp2(logits - lax.broadcast_in_dim(column_sums, logits.shape, [1]))
            cotangent_tile = hopper.wait(cotangents, i)
            d_value, slopes = say.add_products(
                (d_value, parts.of(weights, count), cotangent_tile),
                (say.zeros(logits.shape), value_tile, say.transposed(cotangent_tile)),
            )
            hopper.done(cotangents, i)
            column_dots = say.vector(hopper.wait(row_dots, i)[0].at[:columns], 1)
            hopper.done(row_dots, i)
            slopes = weights * (slopes - lax.broadcast_in_dim(column_dots, slopes.shape, [1]))
            (d_key,) = say.add_products((d_key, parts.of(slopes, count), query_tile))
            hopper.done(queries, i)
            return d_key, d_value

        zeros = say.zeros((rows, head_dim))
        d_key, d_value = lax.fori_loop(0, steps, step, (zeros, zeros))
        visible = say.numbers(zeros.shape, 0) + first < length
        hopper.store(jnp.where(visible, d_key * head_dim**-0.5, 0.0), key_tile)
        hopper.store(jnp.where(visible, d_value, 0.0), value_tile)
        gpu.commit_smem()
        hopper.save(key_tile, hopper.of_head(key_out, sample, mine, head))
        hopper.save(value_tile, hopper.of_head(value_out, sample, mine, head))
        gpu.wait_smem_to_gmem(0)

    @pl.when(group == GROUPS)
    def copy():
        gpu.set_max_registers(40, action="decrease")

        def there(i):
            return pl.ds(i * columns, columns)

        def numbers(array, i):
            return (array.at[sample, head, pl.ds(i * columns, row_sums.tiles[0].shape[1])],)

        hopper.fill(
            steps,
            (queries, lambda i: hopper.of_head(query, sample, there(i), head)),
            (row_sums, lambda i: numbers(sums, i)),
            (cotangents, lambda i: hopper.of_head(cotangent, sample, there(i), head)),
            (row_dots, lambda i: numbers(dots, i)),
        )
