"""Block sizes of attention for the tuner: of the forward kernel and of the gradient kernels."""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import attention
from pallas_kernels.attention import gpu as attention_gpu
from pallas_kernels.attention import tpu as attention_tpu
from pallas_kernels.core import device, tiles
from pallas_kernels.core.tiles import Tiles
from pallas_kernels.tools.tunable import Op, Shape

# The 14B model's self-attention at full size: 2400 history tokens and 8640 noisy tokens.
AXES = {"b": 1, "n": 11040, "heads": 40, "head_dim": 128}
DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))
TPU_SIZES = {"block_q": (512, 1024, 2048), "block_k": (512, 1024, 2048), "block_k_compute": (256, 512, 1024)}
GPU_SIZES = {
    "attention": {"block_q": (64, 128), "block_k": (64, 128, 192, 256), "slots": (2, 3, 4)},
    "attention_dq": {"block_q": (64, 128), "block_k": (64, 128), "slots": (2, 3, 4)},
    "attention_dkv": {"block_q": (64, 128), "block_k": (64, 128), "slots": (2, 3, 4)},
    # Three parts per tile leave no room for more slots.
    "attention_float32": {"block_q": (64,), "block_k": (16, 32, 64), "slots": (1, 2, 3, 4)},
    "attention_dq_float32": {"block_q": (64,), "block_k": (16, 32), "slots": (1, 2)},
    "attention_dkv_float32": {"block_q": (16, 32), "block_k": (64,), "slots": (1, 2)},
}


def _arguments(dtype: Any, shape: Shape) -> tuple[jax.Array, ...]:
    """Query, key, value and a cotangent."""
    sizes = tuple(shape[axis] for axis in AXES)
    return tuple(jax.random.normal(key, sizes, dtype) for key in jax.random.split(jax.random.key(0), 4))


def _kernels(platform: str) -> Any:
    return attention_tpu if platform == "tpu" else attention_gpu


def _candidates(op: str, dtype: Any, platform: str, shape: Shape) -> list[Tiles]:
    name = attention_gpu.tables(dtype)[op]
    if name not in _kernels(platform).tables(dtype).values():
        return []
    sizes = TPU_SIZES if platform == "tpu" else GPU_SIZES[name]
    every = [dict(zip(sizes, chosen)) for chosen in product(*sizes.values())]
    return [chosen for chosen in every if chosen.get("block_k_compute", 0) <= chosen["block_k"]]


def _kernel(op: str, chosen: Tiles) -> Callable[..., Any]:
    """Attention with the sizes `chosen` for `op`, and the table's sizes for the other kernels.

    The forward kernel stores what gradients need, as in training: its sizes must leave shared memory for that.
    """

    def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        if reason := attention.unsupported(query):
            raise ValueError(reason)
        kernels = _kernels(device.platform())
        names = kernels.tables(query.dtype)
        sizes = {part: tiles.lookup(name, device.kind(), query.shape[1]) for part, name in names.items()}
        return kernels.attention(query, key, value, None, sizes | {op: chosen})

    return (lambda *inputs: jax.vjp(attend, *inputs)[0]) if op == "attention" else attend


def _alternatives(dtype: Any, platform: str) -> dict[str, Callable[..., Any]]:
    if dtype == jnp.float32:
        return {"xla": jax.default_matmul_precision("highest")(attention.reference)}
    cudnn = {"cudnn": partial(jax.nn.dot_product_attention, implementation="cudnn")} if platform == "gpu" else {}
    return cudnn | {"xla": attention.reference}


def _values(attend: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    return attend, arguments[:3]


def _gradients(attend: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The whole backward pass; the forward pass before it is not timed."""
    *inputs, cotangent = arguments
    _, backward = jax.jit(partial(jax.vjp, attend))(*inputs)
    return lambda backward, cotangent: backward(cotangent), (backward, cotangent)


def _op(op: str, dtype: Any) -> Op:
    products = 2 if op == "attention" else 5

    def work(shape: Shape) -> float:
        return products * 2.0 * shape["b"] * shape["heads"] * shape["n"] ** 2 * shape["head_dim"]

    return Op(
        axes=AXES,
        length="n",
        fixed=("head_dim",),
        work=work,
        unit="FLOP",
        arguments=partial(_arguments, dtype),
        candidates=partial(_candidates, op, dtype),
        kernel=partial(_kernel, op),
        alternatives=partial(_alternatives, dtype),
        prepared=_values if op == "attention" else _gradients,
        tolerance=1e-4 if dtype == jnp.float32 else 0.02,
    )


OPS = {name: _op(op, dtype) for dtype in DTYPES for op, name in attention_gpu.tables(dtype).items()}
