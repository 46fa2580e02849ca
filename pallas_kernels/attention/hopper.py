"""Parts of attention's kernels for Hopper in Mosaic GPU: rings of tiles in shared memory, products on tensor cores.

A block of the grid has `GROUPS` warpgroups that compute and one more that copies for them. `COMPILED` and
`INTERPRETED` hold the operations that differ between compiler and interpreter; the interpreter has neither register
layouts nor products into registers.

A tile is a tuple of bfloat16 parts (`parts`), as many as its array's dtype has. Each part has its own memory instead
of a row of one array, because from 0.11 on jax cannot lower a product whose operand a constant index selects.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as gpu
from jaxtyping import Array

from pallas_kernels.attention import parts

GROUPS = 2  # warpgroups that compute
ROWS = 8  # TMA copies tiled arrays whose length is a multiple of this
VECTOR = 32  # smallest number of float32 values that a warpgroup copies


Tile = tuple[Any, ...]


class Ring(NamedTuple):
    """Slots in shared memory: one warpgroup fills a slot while the others use the slots filled before.

    `tiles` are the parts of all slots, [slots, ...] each.
    """

    tiles: Tile
    filled: Any
    free: Any


def matrices(count: int, shape: tuple[int, ...], columns: int) -> Tile:
    """Shared memory for the `count` parts of matrices [..., rows, head_dim], as wgmma reads them where `columns` are
    added up.
    """
    width = next((size for size in (64, 32, 16) if columns % size == 0), 64)
    transforms = (gpu.TilingTransform((ROWS, width)), gpu.SwizzleTransform(2 * width))
    return tuple(gpu.SMEM(shape, jnp.bfloat16, transforms=transforms) for _ in range(count))


def ring(slots: int, tile: Tile) -> Ring:
    """Scratch memory of a ring of such tiles in shared memory."""
    return Ring(
        tuple(gpu.SMEM((slots, *part.shape), part.dtype, transforms=part.transforms) for part in tile),
        gpu.Barrier(num_arrivals=len(tile), num_barriers=slots),
        gpu.Barrier(num_arrivals=GROUPS, num_barriers=slots),
    )


def wait(ring: Ring, i: Array) -> Tile:
    """The `i`th tile copied into `ring`; waits until it has arrived."""
    gpu.barrier_wait(ring.filled.at[_slot(ring, i)])
    return at(ring.tiles, _slot(ring, i))


def done(ring: Ring, i: Array) -> None:
    """Marks the `i`th tile as no longer needed by this warpgroup."""
    gpu.barrier_arrive(ring.free.at[_slot(ring, i)])


def fill(steps: Array, *rings: tuple[Ring, Callable[[Array], tuple[Any, ...]]]) -> None:
    """Copies, for each `i` of `steps`, the parts that each ring's function gives into that ring."""
    slots = _slots(rings[0][0])

    def step(i, _):
        for ring, source in rings:
            slot = _slot(ring, i)
            pl.when(i >= slots)(partial(gpu.barrier_wait, ring.free.at[slot]))
            load(source(i), at(ring.tiles, slot), ring.filled.at[slot])

    def drain(i, _):
        for ring, _ in rings:
            gpu.barrier_wait(ring.free.at[_slot(ring, i)])

    lax.fori_loop(0, steps, step, None)
    lax.fori_loop(jnp.maximum(steps - slots, 0), steps, drain, None)  # every barrier must be observed before the end


def _slots(ring: Ring) -> int:
    return ring.tiles[0].shape[0]


def _slot(ring: Ring, i: Array) -> Array:
    return lax.rem(i, jnp.array(_slots(ring), i.dtype))


def at(tiles: Tile, i: Array) -> Tile:
    """The `i`th tile, whose parts are [..., rows, head_dim]."""
    return tuple(part.at[i] for part in tiles)


def load(sources: tuple[Any, ...], tile: Tile, barrier: Any) -> None:
    """Copies the parts of a tile into shared memory; each signals `barrier` on arrival."""
    for source, part in zip(sources, tile, strict=True):
        gpu.copy_gmem_to_smem(source, part, barrier)


def store(x: Array, tile: Tile) -> None:
    """Writes float32 registers to the parts of a tile in shared memory."""
    for part, value in zip(tile, parts.of(x, len(tile)), strict=True):
        part[...] = value


def save(tile: Tile, destinations: tuple[Any, ...]) -> None:
    """Copies the parts of a tile to global memory."""
    for part, destination in zip(tile, destinations, strict=True):
        gpu.copy_smem_to_gmem(part, destination)


def of_head(array: Any, sample: Array, rows: Any, head: Array) -> tuple[Any, ...]:
    """The parts of some rows of one head in global memory, as `parts.split` wrote them."""
    heads = lax.axis_size("head")
    return tuple(array.at[sample, rows, head + first] for first in range(0, array.shape[2], heads))


class Dialect(NamedTuple):
    """Operations that differ between compiler and interpreter. Matrices are tuples of their parts.

    zeros: `(rows, columns)` or `(rows,)` of float32 0, as a product lies in registers, or as its rows do
    numbers: of the rows (axis 0) or columns (axis 1) of a product of some shape
    vector: a float32 vector in shared memory as it lies beside a product, along its rows (axis 0) or columns (axis 1)
    transposed: a matrix in shared memory, to be read as its transpose
    product: a @ b, both in shared memory, in float32 registers; calls `meanwhile` when it is under way
    add_products: total + a @ b for each `(total, a, b)`, a in shared memory or registers, all under way at once
    """

    zeros: Callable[[tuple[int, ...]], Array]
    numbers: Callable[[tuple[int, ...], int], Array]
    vector: Callable[[Any, int], Array]
    transposed: Callable[[Any], Any]
    product: Callable[..., Array]
    add_products: Callable[..., tuple[Array, ...]]


def _zeros(shape: tuple[int, ...]) -> Array:
    layout = gpu.Layout.WGMMA if len(shape) == 2 else gpu.Layout.WGMMA.reduce(1)
    return gpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)


def _nothing() -> None:
    pass


def _product(a: Tile, b: Tile, meanwhile: Callable[[], None] = _nothing) -> Array:
    def run(accumulator):
        for i, j in parts.PAIRS[len(a)]:
            gpu.wgmma(accumulator, a[i], b[j])
        meanwhile()
        return accumulator[...]

    return pl.run_scoped(run, gpu.ACC((a[0].shape[0], b[0].shape[1]), jnp.float32))


def _add_products(*terms: tuple[Array, Tile, Tile]) -> Any:
    def run(accumulators):
        for accumulator, (_, a, b) in zip(accumulators, terms):
            for i, j in parts.PAIRS[len(a)]:
                gpu.wgmma(accumulator, a[i], b[j])

    return pl.run_state(run)(tuple(gpu.ACC.init(total) for total, _, _ in terms))


COMPILED = Dialect(
    zeros=_zeros,
    numbers=lambda shape, axis: gpu.broadcasted_iota(jnp.int32, shape, axis, layout=gpu.Layout.WGMMA),
    vector=lambda ref, axis: gpu.layout_cast(ref[...], gpu.Layout.WGMMA.reduce(1 - axis)),
    transposed=lambda refs: tuple(ref.transpose((1, 0)) for ref in refs),
    product=_product,
    add_products=_add_products,
)


def _dot(a: Tile, b: Tile, meanwhile: Callable[[], None] = _nothing) -> Array:
    meanwhile()
    pairs = parts.PAIRS[len(a)]
    return parts.added(jnp.dot(a[i][...], b[j][...], preferred_element_type=jnp.float32) for i, j in pairs)


INTERPRETED = Dialect(
    zeros=lambda shape: jnp.zeros(shape, jnp.float32),
    numbers=partial(lax.broadcasted_iota, jnp.int32),
    vector=lambda ref, axis: ref[...],
    transposed=lambda refs: tuple(ref[...].T for ref in refs),
    product=_dot,
    add_products=lambda *terms: tuple(total + _dot(a, b) for total, a, b in terms),
)


def exponent(head_dim: int) -> float:
    """The factor s for which exp(query key^T / sqrt(head_dim)) is exp2(s query key^T); the hardware has exp2 only."""
    return head_dim**-0.5 * math.log2(math.e)


def hide(say: Dialect, logits: Array, first: Array, length: Array) -> Array:
    """Masks keys from `length` on: their logits become -inf. The first column is key `first`."""

    def hidden(logits: Array) -> Array:
        return jnp.where(say.numbers(logits.shape, 1) + first < length, logits, -jnp.inf)

    return lax.cond(first + logits.shape[1] > length, hidden, lambda logits: logits, logits)


def launch(
    kernel: Callable[..., None],
    arrays: tuple[Array, ...],
    out: tuple[jax.ShapeDtypeStruct, ...],
    *,
    grid: tuple[int, int, int],
    scratch: dict[str, Any],
    interpret: Any,
) -> tuple[Array, ...]:
    """Runs `kernel(*arrays, *out, **scratch, say=Dialect)` over a grid of heads, tiles and samples, in warpgroups whose
    number is the axis "group". `interpret` is jax's `InterpretGPUParams`, or None to compile.
    """
    return gpu.kernel(
        partial(kernel, say=COMPILED if interpret is None else INTERPRETED),
        out_type=out,
        grid=grid,
        grid_names=("head", "tile", "sample"),
        num_threads=GROUPS + 1,
        thread_name="group",
        scratch_types=scratch,
        compiler_params=gpu.CompilerParams(approx_math=True),
        **({} if interpret is None else {"interpret": interpret}),
    )(*arrays)


def padded(x: Array) -> Array:
    """[b, n, heads, head_dim] with zeros up to a multiple of `ROWS` rows."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % ROWS), (0, 0), (0, 0)])


def room(length: int, tile: int, interpret: Any) -> int:
    """Rows to allocate for an output written in tiles: TMA drops writes beyond the end, the interpreter does not."""
    return length if interpret is None else -(-length // tile) * tile
