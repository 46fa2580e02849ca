"""Block sizes of gated_residual for the tuner."""

from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels.core import device
from pallas_kernels.core.tiles import Tiles
from pallas_kernels.gated_residual import api, gpu, tpu
from pallas_kernels.tools.row_tuning import EPS, row_op, tables, tokens


def _kernel(sizes: Tiles) -> Callable[..., Any]:
    def run(*inputs: jax.Array) -> Any:
        kernels: Any = tpu if device.platform() == "tpu" else gpu
        return kernels.forward(*inputs, (inputs[0].shape[1],), EPS, sizes)

    return run


def _reference(x: jax.Array, y: jax.Array, gate: jax.Array, shift: jax.Array, gain: jax.Array) -> Any:
    return api.reference(x, y, gate, shift, gain, (x.shape[1],), EPS)


OPS = {
    "gated_residual": row_op(lambda shape: [*tokens(shape, 2), *tables(shape, 1, 3)], 4, _kernel, _reference),
}
