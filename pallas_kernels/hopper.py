"""What attention's kernels for Hopper in Mosaic GPU share: rings of tiles in shared memory, products on tensor cores.

A block of the grid has `GROUPS` warpgroups that compute and one more that copies for them. `COMPILED` and `INTERPRETED`
hold what a kernel says differently to the compiler and to the interpreter, which knows neither layouts of registers nor
products into them.
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

GROUPS = 2  # warpgroups that compute
ROWS = 8  # TMA copies tiled arrays whose length is a multiple of this
TILED = (gpu.TilingTransform((ROWS, 64)), gpu.SwizzleTransform(128))  # how wgmma reads 16-bit tiles


class Ring(NamedTuple):
    """Slots in shared memory, which one warpgroup fills while the others use what they were filled with before."""

    tiles: Any
    filled: Any
    free: Any


def ring(slots: int, shape: tuple[int, ...], dtype: Any) -> Ring:
    """Scratch memory of a ring of matrices, or of vectors."""
    return Ring(
        gpu.SMEM((slots, *shape), dtype, transforms=TILED if len(shape) == 2 else ()),
        gpu.Barrier(num_barriers=slots),
        gpu.Barrier(num_arrivals=GROUPS, num_barriers=slots),
    )


def wait(ring: Ring, i: Array) -> Any:
    """The `i`th tile that is copied into `ring`, as soon as it is there."""
    gpu.barrier_wait(ring.filled.at[_slot(ring, i)])
    return ring.tiles.at[_slot(ring, i)]


def done(ring: Ring, i: Array) -> None:
    """This warpgroup needs the `i`th tile no more."""
    gpu.barrier_arrive(ring.free.at[_slot(ring, i)])


def fill(steps: Array, *parts: tuple[Ring, Callable[[Array], Any]]) -> None:
    """For `i` of `steps` copies what each part's function gives for `i` into its ring."""
    slots = parts[0][0].tiles.shape[0]

    def step(i, _):
        for ring, source in parts:
            slot = _slot(ring, i)
            pl.when(i >= slots)(partial(gpu.barrier_wait, ring.free.at[slot]))
            gpu.copy_gmem_to_smem(source(i), ring.tiles.at[slot], ring.filled.at[slot])

    def drain(i, _):
        for ring, _ in parts:
            gpu.barrier_wait(ring.free.at[_slot(ring, i)])

    lax.fori_loop(0, steps, step, None)
    lax.fori_loop(jnp.maximum(steps - slots, 0), steps, drain, None)  # no barrier ends unobserved


def _slot(ring: Ring, i: Array) -> Array:
    return lax.rem(i, jnp.array(ring.tiles.shape[0], i.dtype))


class Dialect(NamedTuple):
    """
    zeros: `(rows, columns)` or `(rows,)` of float32 0, as a product lies in registers, or as its rows do
    numbers: of the rows (axis 0) or columns (axis 1) of a product of some shape
    vector: a float32 vector in shared memory as it lies beside a product, along its rows (axis 0) or columns (axis 1)
    transposed: a matrix in shared memory, to be read as its transpose
    product: a (in shared memory or registers) @ b (in shared memory), in float32 registers; calls `meanwhile` when it
        is under way
    add_products: total + a @ b for each `(total, a, b)`, all under way at once
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


def _product(a: Any, b: Any, meanwhile: Callable[[], None] = _nothing) -> Array:
    def run(accumulator):
        gpu.wgmma(accumulator, a, b)
        meanwhile()
        return accumulator[...]

    return pl.run_scoped(run, gpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def _add_products(*terms: tuple[Array, Any, Any]) -> Any:
    def run(accumulators):
        for accumulator, (_, a, b) in zip(accumulators, terms):
            gpu.wgmma(accumulator, a, b)

    return pl.run_state(run)(tuple(gpu.ACC.init(total) for total, _, _ in terms))


COMPILED = Dialect(
    zeros=_zeros,
    numbers=lambda shape, axis: gpu.broadcasted_iota(jnp.int32, shape, axis, layout=gpu.Layout.WGMMA),
    vector=lambda ref, axis: gpu.layout_cast(ref[...], gpu.Layout.WGMMA.reduce(1 - axis)),
    transposed=lambda ref: ref.transpose((1, 0)),
    product=_product,
    add_products=_add_products,
)


def _dot(a: Any, b: Any, meanwhile: Callable[[], None] = _nothing) -> Array:
    meanwhile()
    return jnp.dot(a[...], b[...], preferred_element_type=jnp.float32)


INTERPRETED = Dialect(
    zeros=lambda shape: jnp.zeros(shape, jnp.float32),
    numbers=partial(lax.broadcasted_iota, jnp.int32),
    vector=lambda ref, axis: ref[...],
    transposed=lambda ref: ref[...].T,
    product=_dot,
    add_products=lambda *terms: tuple(total + _dot(a, b) for total, a, b in terms),
)


def exponent(head_dim: int) -> float:
    """exp(query key^T / sqrt(head_dim)) is exp2(this query key^T), which is what the hardware has."""
    return head_dim**-0.5 * math.log2(math.e)


def hide(say: Dialect, logits: Array, first: Array, length: Array) -> Array:
    """-inf for keys from `length` on; the first column is key `first`."""

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
    """The rows of an output that is written in tiles: TMA drops what is beyond an end, the interpreter would not."""
    return length if interpret is None else -(-length // tile) * tile
