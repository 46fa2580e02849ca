"""Block sizes of adaLN for the tuner: of the values and of the gradients."""

from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels.adaln import api, gpu, tpu
from pallas_kernels.core import device
from pallas_kernels.core.tiles import Tiles
from pallas_kernels.tools.row_tuning import EPS, row_op, runs, tables, tokens


def _kernels() -> Any:
    return tpu if device.platform() == "tpu" else gpu


def _values(sizes: Tiles) -> Callable[..., Any]:
    return lambda x, shift, scale: _kernels().forward(x, shift, scale, runs(x), EPS, sizes)


def _gradients(sizes: Tiles) -> Callable[..., Any]:
    return lambda x, shift, scale, upper: _kernels().backward(x, scale, upper, runs(x), EPS, sizes)


def _reference(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    return api.reference(x, shift, scale, runs(x), EPS)


def _reference_gradients(x: jax.Array, shift: jax.Array, scale: jax.Array, upper: jax.Array) -> Any:
    return jax.vjp(_reference, x, shift, scale)[1](upper)


def _inputs(shape: Any, cotangent: bool) -> list[jax.Array]:
    x, upper = tokens(shape, 2)
    return [x, *tables(shape, 2, 2), *[upper] * cotangent]


OPS = {
    "adaln": row_op(lambda shape: _inputs(shape, False), 2, _values, _reference),
    "adaln_backward": row_op(lambda shape: _inputs(shape, True), 3, _gradients, _reference_gradients),
}
