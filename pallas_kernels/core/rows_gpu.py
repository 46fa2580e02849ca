"""Parts of kernels over rows on Hopper GPUs in Mosaic GPU: a warpgroup holds a token's features in registers."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as gpu
from jaxtyping import Array, Float

from pallas_kernels.core import mosaic
from pallas_kernels.core.rows import Runs

THREADS = 128


def spans(runs: Runs, block: int) -> np.ndarray:
    """[blocks, 3]: first token, one past the last token, and run of each block. No block holds tokens of two runs."""
    ends = np.cumsum(runs)
    return np.asarray(
        [
            (start, min(start + block, end), run)
            for run, (length, end) in enumerate(zip(runs, ends))
            for start in range(end - length, end, block)
        ],
        np.int32,
    )


def launch(body: Any, out: Any, grid: tuple[int, int], interpret: Any) -> Any:
    """Runs `body` for each block ("tile") of each "sample", one warpgroup each."""
    return gpu.kernel(
        body,
        out_type=out,
        grid=grid[::-1],
        grid_names=("tile", "sample"),
        compiler_params=gpu.CompilerParams(reduction_scratch_bytes=1024),
        **({} if interpret is None else {"interpret": interpret}),
    )


def row(ref: Any, index: tuple, interpret: bool) -> Array:
    """A row of features as float32 in registers; each thread holds neighbouring features, which it loads at once."""
    d = ref.shape[-1]
    vector = max(size for size in (1, 2, 4, 8) if d % (size * THREADS) == 0)
    value = ref[index] if interpret else mosaic.load(ref, index, gpu.Layout.WG_STRIDED((d,), vec_size=vector))
    return value.astype(jnp.float32)


def normed(x: Float[Array, " d"], eps: float) -> tuple[Float[Array, " d"], Float[Array, ""]]:
    """The layer norm of `x`, and the factor 1 / deviation."""
    d = x.shape[0]
    x = x - jnp.sum(x) / d
    rate = lax.rsqrt(jnp.sum(x * x) / d + eps)
    return x * rate, rate


def block(spans: Any, table: Any) -> tuple[Array, Array, Array, tuple[Array, Array]]:
    """This block's sample, first token and one past the last, and the index of its row of `table`."""
    tile, sample = lax.axis_index("tile"), lax.axis_index("sample")
    return sample, spans[tile, 0], spans[tile, 1], (sample if table.shape[0] > 1 else jnp.int32(0), spans[tile, 2])
