"""Parts of the tuning of kernels over rows: inputs of the 14B model's size, and candidate block sizes."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.core.tiles import Tiles
from pallas_kernels.tools.tunable import Op, Shape

# The 14B model's tokens at full size.
AXES = {"b": 1, "n": 11040, "heads": 40, "head_dim": 128}
HISTORY, EPS = 2400, 1e-6
BLOCKS = {"tpu": (16, 32, 64, 96, 128, 160, 256), "gpu": (1, 2, 4, 8, 16, 32, 64)}


def candidates(platform: str, shape: Shape) -> list[Tiles]:
    """Candidate numbers of tokens per block."""
    return [{"block": block} for block in BLOCKS[platform]]


def draw(*sizes: int, dtype: Any, seed: int) -> jax.Array:
    """Standard normal numbers."""
    return jax.random.normal(jax.random.key(seed), sizes, dtype)


def tokens(shape: Shape, count: int) -> list[jax.Array]:
    """Arrays [b, n, d] in bfloat16."""
    sizes = shape["b"], shape["n"], shape["heads"] * shape["head_dim"]
    return [draw(*sizes, dtype=jnp.bfloat16, seed=seed) for seed in range(count)]


def tables(shape: Shape, runs: int, count: int) -> list[jax.Array]:
    """Arrays [b, runs, d] in float32."""
    sizes = shape["b"], runs, shape["heads"] * shape["head_dim"]
    return [draw(*sizes, dtype=jnp.float32, seed=10 + seed) for seed in range(count)]


def runs(x: jax.Array) -> tuple[int, int]:
    """History and noisy tokens."""
    history = min(HISTORY, x.shape[1] // 2)
    return history, x.shape[1] - history


def row_op(
    arguments: Callable[[Shape], Any],
    passes: float,
    kernel: Any,
    reference: Any,
    platforms: Sequence[str] = ("tpu", "gpu"),
) -> Op:
    """An op that reads and writes its tokens `passes` times in total, and has kernels for `platforms`."""

    def work(shape: Shape) -> float:
        return passes * 2 * shape["b"] * shape["n"] * shape["heads"] * shape["head_dim"]

    return Op(
        axes=AXES,
        length="n",
        fixed=("heads", "head_dim"),
        work=work,
        unit="B",
        arguments=lambda shape: tuple(arguments(shape)),
        candidates=lambda platform, shape: candidates(platform, shape) if platform in platforms else [],
        kernel=kernel,
        alternatives=lambda platform: {"xla": reference},
    )
