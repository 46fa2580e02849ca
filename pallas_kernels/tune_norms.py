"""What the tuner has to know of the norms' kernels: how many tokens a block has."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import (
    adaln,
    adaln_gpu,
    adaln_tpu,
    device,
    gated_residual,
    gated_residual_gpu,
    gated_residual_tpu,
    norm_rope,
    norm_rope_gpu,
    norm_rope_tpu,
)
from pallas_kernels.tiles import Tiles
from pallas_kernels.tunable import Op, Shape

# The 14B model's tokens at full size.
AXES = {"b": 1, "n": 11040, "heads": 40, "head_dim": 128}
HISTORY, EPS = 2400, 1e-6
BLOCKS = {"tpu": (16, 32, 64, 96, 128, 160, 256), "gpu": (1, 2, 4, 8, 16, 32, 64)}


def _history(n: int) -> int:
    return min(HISTORY, n // 2)


def _candidates(platform: str, shape: Shape) -> list[Tiles]:
    return [{"block": block} for block in BLOCKS[platform]]


def _draw(*sizes: int, dtype: Any, seed: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), sizes, dtype)


def _tokens(shape: Shape, count: int) -> list[jax.Array]:
    sizes = shape["b"], shape["n"], shape["heads"] * shape["head_dim"]
    return [_draw(*sizes, dtype=jnp.bfloat16, seed=seed) for seed in range(count)]


def _tables(shape: Shape, runs: int, count: int) -> list[jax.Array]:
    sizes = shape["b"], runs, shape["heads"] * shape["head_dim"]
    return [_draw(*sizes, dtype=jnp.float32, seed=10 + seed) for seed in range(count)]


def _module(tpu: Any, gpu: Any) -> Any:
    return tpu if device.platform() == "tpu" else gpu


def _op(arguments: Callable[[Shape], Any], passes: float, kernel: Any, reference: Any) -> Op:
    def work(shape: Shape) -> float:
        return passes * 2 * shape["b"] * shape["n"] * shape["heads"] * shape["head_dim"]

    return Op(
        axes=AXES,
        length="n",
        fixed=("heads", "head_dim"),
        work=work,
        unit="B",
        arguments=lambda shape: tuple(arguments(shape)),
        candidates=_candidates,
        kernel=kernel,
        alternatives=lambda platform: {"xla": reference},
    )


def _runs(x: jax.Array) -> tuple[int, int]:
    history = _history(x.shape[1])
    return history, x.shape[1] - history


def _adaln(sizes: Tiles) -> Callable[..., Any]:
    return lambda x, shift, scale: _module(adaln_tpu, adaln_gpu).forward(x, shift, scale, _runs(x), EPS, sizes)


def _adaln_backward(sizes: Tiles) -> Callable[..., Any]:
    return lambda x, shift, scale, upper: _module(adaln_tpu, adaln_gpu).backward(x, scale, upper, _runs(x), EPS, sizes)


def _adaln_gradients(x: jax.Array, shift: jax.Array, scale: jax.Array, upper: jax.Array) -> Any:
    return jax.vjp(lambda x, shift, scale: adaln.reference(x, shift, scale, _runs(x), EPS), x, shift, scale)[1](upper)


def _norm_rope_arguments(shape: Shape) -> Any:
    angles = _draw(1, shape["n"], shape["head_dim"] // 2, dtype=jnp.float32, seed=20)
    weight = _draw(shape["heads"], shape["head_dim"], dtype=jnp.float32, seed=21)
    return *_tokens(shape, 1), weight, jnp.cos(angles), jnp.sin(angles)


def _norm_rope(sizes: Tiles) -> Callable[..., Any]:
    def run(x: jax.Array, weight: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        def forward(*inputs: Any) -> jax.Array:
            return _module(norm_rope_tpu, norm_rope_gpu).forward(*inputs, sizes)

        return norm_rope.by(forward, x, weight.reshape(-1), weight.shape[0], EPS, (cos, sin), None, 0)

    return run


def _norm_rope_reference(x: jax.Array, weight: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    return norm_rope.reference(x, weight.reshape(-1), weight.shape[0], EPS, (cos, sin))


def _gated_residual(sizes: Tiles) -> Callable[..., Any]:
    def run(*inputs: jax.Array) -> Any:
        kernels = _module(gated_residual_tpu, gated_residual_gpu)
        return kernels.forward(*inputs, (inputs[0].shape[1],), EPS, sizes)

    return run


def _gated_residual_reference(x: jax.Array, y: jax.Array, gate: jax.Array, shift: jax.Array, gain: jax.Array) -> Any:
    return gated_residual.reference(x, y, gate, shift, gain, (x.shape[1],), EPS)


OPS: dict[str, Op] = {
    "adaln": _op(
        lambda shape: _tokens(shape, 1) + _tables(shape, 2, 2),
        2, _adaln, lambda x, shift, scale: adaln.reference(x, shift, scale, _runs(x), EPS),
    ),
    "adaln_backward": _op(
        lambda shape: _tokens(shape, 2)[:1] + _tables(shape, 2, 2) + _tokens(shape, 2)[1:],
        3, _adaln_backward, _adaln_gradients,
    ),
    "norm_rope": _op(_norm_rope_arguments, 2, _norm_rope, _norm_rope_reference),
    "gated_residual": _op(
        lambda shape: _tokens(shape, 2) + _tables(shape, 1, 3), 4, _gated_residual, _gated_residual_reference
    ),
}  # fmt: skip
