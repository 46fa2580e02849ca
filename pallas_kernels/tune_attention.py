"""What the tuner has to know of attention: its values, and its gradients, whose kernels have sizes of their own."""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import attention, attention_gpu, attention_tpu, device, tiles
from pallas_kernels.tiles import Tiles
from pallas_kernels.tunable import Op, Shape

# The 14B model's self-attention at full size: 2400 tokens of history, 8640 noisy ones.
AXES = {"b": 1, "n": 11040, "heads": 40, "head_dim": 128}
FORWARD = "attention"
TPU_SIZES = {"block_q": (512, 1024, 2048), "block_k": (512, 1024, 2048), "block_k_compute": (256, 512, 1024)}
GPU_SIZES = {
    "attention": {"block_q": (64, 128), "block_k": (64, 128, 192, 256), "slots": (2, 3, 4)},
    "attention_dq": {"block_q": (64, 128), "block_k": (64, 128), "slots": (2, 3, 4)},
    "attention_dkv": {"block_q": (64, 128), "block_k": (64, 128), "slots": (2, 3, 4)},
}


def _arguments(shape: Shape) -> tuple[jax.Array, ...]:
    """Query, key, value and a cotangent."""
    sizes = tuple(shape[axis] for axis in AXES)
    return tuple(jax.random.normal(key, sizes, jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 4))


def _candidates(op: str, platform: str, shape: Shape) -> list[Tiles]:
    kernels = attention_tpu if platform == "tpu" else attention_gpu
    if op not in kernels.OPS:
        return []
    sizes = TPU_SIZES if platform == "tpu" else GPU_SIZES[op]
    every = [dict(zip(sizes, chosen)) for chosen in product(*sizes.values())]
    return [chosen for chosen in every if chosen.get("block_k_compute", 0) <= chosen["block_k"]]


def _kernel(op: str, chosen: Tiles) -> Callable[..., Any]:
    """With `chosen` for `op`, and what the table has for the other kernels."""

    def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        if reason := attention.unsupported(query):
            raise ValueError(reason)
        kernels = attention_tpu if device.platform() == "tpu" else attention_gpu
        sizes = {name: tiles.lookup(name, device.kind(), query.shape[1]) for name in kernels.OPS}
        return kernels.attention(query, key, value, None, sizes | {op: chosen})

    return attend


def _alternatives(platform: str) -> dict[str, Callable[..., Any]]:
    cudnn = {"cudnn": partial(jax.nn.dot_product_attention, implementation="cudnn")} if platform == "gpu" else {}
    return cudnn | {"xla": attention.reference}


def _values(attend: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    return attend, arguments[:3]


def _gradients(attend: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The whole backward pass, after a forward pass that is not timed."""
    *inputs, cotangent = arguments
    _, backward = jax.jit(partial(jax.vjp, attend))(*inputs)
    return lambda backward, cotangent: backward(cotangent), (backward, cotangent)


def _op(name: str) -> Op:
    products = 2 if name == FORWARD else 5

    def work(shape: Shape) -> float:
        return products * 2.0 * shape["b"] * shape["heads"] * shape["n"] ** 2 * shape["head_dim"]

    return Op(
        axes=AXES,
        length="n",
        fixed=("head_dim",),
        work=work,
        unit="FLOP",
        arguments=_arguments,
        candidates=partial(_candidates, name),
        kernel=partial(_kernel, name),
        alternatives=_alternatives,
        prepared=_values if name == FORWARD else _gradients,
    )


OPS = {name: _op(name) for name in attention_gpu.OPS}
