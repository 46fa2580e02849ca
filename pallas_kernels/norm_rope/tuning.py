"""Block sizes of norm_rope for the tuner: of the values, and on TPUs of the gradients."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.core import device
from pallas_kernels.core.tiles import Tiles
from pallas_kernels.norm_rope import api, gpu, tpu
from pallas_kernels.tools.row_tuning import EPS, draw, row_op, tokens
from pallas_kernels.tools.tunable import Shape


def _inputs(shape: Shape) -> Any:
    angles = draw(1, shape["n"], shape["head_dim"] // 2, dtype=jnp.float32, seed=20)
    weight = draw(shape["heads"], shape["head_dim"], dtype=jnp.float32, seed=21)
    return *tokens(shape, 1), weight, jnp.cos(angles), jnp.sin(angles)


def _kernel(sizes: Tiles) -> Callable[..., Any]:
    def run(x: jax.Array, weight: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        def forward(*inputs: Any) -> jax.Array:
            kernels: Any = tpu if device.platform() == "tpu" else gpu
            return kernels.forward(*inputs, sizes)

        return api.from_kernels(forward, x, weight.reshape(-1), weight.shape[0], EPS, (cos, sin), None, 0)

    return run


def _reference(x: jax.Array, weight: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    return api.reference(x, weight.reshape(-1), weight.shape[0], EPS, (cos, sin))


def _with_cotangent(shape: Shape) -> Any:
    x, upper = tokens(shape, 2)
    _, *others = _inputs(shape)
    return x, *others, upper.reshape(*upper.shape[:2], shape["heads"], shape["head_dim"])


def _gradients(sizes: Tiles) -> Callable[..., Any]:
    def run(x: jax.Array, weight: jax.Array, cos: jax.Array, sin: jax.Array, upper: jax.Array) -> Any:
        dx, dweight = tpu.backward(x, weight.reshape(1, -1), upper, EPS, api.signed((cos, sin)), (x.shape[1],), sizes)
        return dx, dweight.reshape(weight.shape)

    return run


def _reference_gradients(x: jax.Array, weight: jax.Array, cos: jax.Array, sin: jax.Array, upper: jax.Array) -> Any:
    return jax.vjp(lambda x, weight: _reference(x, weight, cos, sin), x, weight)[1](upper)


OPS = {
    "norm_rope": row_op(_inputs, 2, _kernel, _reference),
    "norm_rope_backward": row_op(_with_cotangent, 3, _gradients, _reference_gradients, platforms=("tpu",)),
}
