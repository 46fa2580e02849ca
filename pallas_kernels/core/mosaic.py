"""Mosaic GPU calls that differ between versions of jax or are private to jax.

They compile with jax 0.10.2, 0.11.2 and 0.12.0.1. `make aot` compiles every kernel with the oldest and the newest
version.
"""

import inspect
from typing import Any

from jax.experimental.pallas import mosaic_gpu as gpu
from jaxlib.mlir.dialects import vector  # Mosaic GPU writes its registers in this dialect
from jaxtyping import Array, Float

# jax 0.10 requires an index argument in `load`; 0.11 also accepts `ref.at`; 0.12 accepts only that.
_LOAD_NEEDS_INDEX = (
    "idx" in (named := inspect.signature(gpu.load).parameters) and named["idx"].default is inspect.Parameter.empty
)


def load(ref: Any, index: tuple, layout: Any, *, optimized: bool = True) -> Array:
    """Reads `ref[index]` into registers in `layout`. `optimized` refuses a load that Mosaic GPU would split into
    elements.
    """
    rest = (...,) if _LOAD_NEEDS_INDEX else ()
    return gpu.load(ref.at[index], *rest, layout=layout, optimized=optimized)


def swap_pairs(x: Float[Array, "heads head_dim"], layout: Any) -> Float[Array, "heads head_dim"]:
    """Swaps the features (0, 1), (2, 3), ... of registers in `layout`, in which each thread holds whole pairs."""

    @gpu.inline_mgpu(arg_types=(layout,), return_type=gpu.ShapeDtypeStruct(x.shape, x.dtype, layout))
    def swap(_, x):
        return x._pointwise(_swap_register)  # private: no public operation accesses the features of one thread

    return swap(x)  # pyright: ignore[reportCallIssue]


def _swap_register(register: Any) -> Any:
    size = register.type.shape[0]
    if size % 2:
        raise ValueError(f"swap_pairs needs an even number of neighbouring features in a thread, got {size}")
    return vector.shuffle(register, register, mask=[i ^ 1 for i in range(size)])
