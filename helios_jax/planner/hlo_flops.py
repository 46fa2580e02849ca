"""Floating point operations of a compiled program's instructions: two for each multiply and add of a product.

Products are dots, convolutions (a TPU's program has no others), cuBLAS calls, and attention kernels, which the compiler
cannot look into; theirs are known from their operands. Elementwise work is left out, as is usual for MFU.
"""

import json
import math
import re

import numpy as np

from helios_jax.planner.hlo import FUSIONS, Computation, Instruction, Module, Shape

# Products over all pairs of queries and keys in an attention kernel. Forward: scores and values. Backward: the scores
# again, and the gradients of scores, queries, keys and values.
FORWARD, BACKWARD = 2, 5
FLOATING = ("bf16", "f16", "f32")
# Products by patterns of attention kernels' names: splash attention on TPUs and cuDNN's on GPUs.
ATTENTION = {
    r"splash_mha_d": BACKWARD,
    r"splash_mha": FORWARD,
    r"__cudnn\$fmha\w*Backward": BACKWARD,
    r"__cudnn\$fmha": FORWARD,
}


def flops(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Operations of one run of `instruction`, with those inside a fusion."""
    opcode = instruction.opcode
    if opcode in FUSIONS:
        inner = module.called(instruction)
        return sum(flops(module, inner, one) for one in inner.instructions.values()) if inner else 0
    if opcode in ("dot", "convolution"):
        count = _dot if opcode == "dot" else _convolution
        return count(instruction, *(one.shapes[0] for one in computation.operands(instruction)[:2]))
    if opcode == "custom-call":
        return _custom_call(computation, instruction)
    return 0


def kernel(instruction: Instruction) -> str | None:
    """The name of the kernel or library call that a custom call runs; None for other instructions and for markers."""
    if instruction.opcode != "custom-call":
        return None
    target = re.search(r'custom_call_target="([^"]+)"', instruction.attributes)
    name = target[1] if target else ""
    if name in ("tpu_custom_call", "mosaic_gpu_v2", "mosaic_gpu"):
        return re.sub(r"[.\d]+$", "", instruction.name)
    return name if name.startswith("__cu") else None


def is_attention(name: str | None) -> bool:
    """True for the name of an attention kernel."""
    return any(re.search(pattern, name or "") for pattern in ATTENTION)


def counted(name: str) -> bool:
    """True where the operations of the kernel `name` are known."""
    return is_attention(name) or name.startswith("__cublas")


def _dot(instruction: Instruction, left: Shape, right: Shape) -> int:
    return 2 * instruction.shapes[0].elements * _contracted(left, _numbers(instruction.attributes, "lhs_contracting"))


def _numbers(text: str, name: str) -> list[int]:
    found = re.search(rf"{name}_dims=\{{([\d,]*)\}}", text)
    return [int(n) for n in found[1].split(",") if n] if found else []


def _contracted(shape: Shape, dims: list[int]) -> int:
    return math.prod(shape.sizes[i] for i in dims)


def _convolution(instruction: Instruction, left: Shape, right: Shape) -> int:
    """Counts products of weights with real inputs, not with padding or with the holes of a dilation.

    A TPU's program writes a batched product as a convolution in which most products are with padding or holes.
    """
    found = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if found is None:
        raise ValueError(f"convolution {instruction.name} has no dim_labels")
    inputs, weights, outputs = found.groups()
    window = _window(instruction.attributes)
    output = instruction.shapes[0]
    count = output.sizes[outputs.index("b")] * output.sizes[outputs.index("f")] * right.sizes[weights.index("i")]
    for i, dim in enumerate(sorted(letter for letter in outputs if letter.isdigit())):
        size = {name: values[i] for name, values in window.items() if i < len(values)}
        count *= _pairs(
            left.sizes[inputs.index(dim)], right.sizes[weights.index(dim)], output.sizes[outputs.index(dim)], size
        )
    groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    return 2 * count // (int(groups[1]) if groups else 1)


def _window(text: str) -> dict[str, list[tuple[int, ...]]]:
    """Numbers of each spatial dimension by name: `pad=0_0x39_39` gives [(0, 0), (39, 39)]."""
    found = re.search(r"window=\{([^}]*)\}", text)
    parts = dict(part.split("=") for part in found[1].split()) if found else {}
    return {name: [tuple(int(n) for n in one.split("_")) for one in text.split("x")] for name, text in parts.items()}


def _pairs(inputs: int, weights: int, outputs: int, size: dict[str, tuple[int, ...]]) -> int:
    """The number of (output, weight) pairs along one dimension that meet a real input."""
    one = (1,)
    low = size.get("pad", (0, 0))[0]
    stride, holes, spread = (size.get(name, one)[0] for name in ("stride", "lhs_dilate", "rhs_dilate"))
    at = np.arange(outputs)[:, None] * stride + np.arange(weights) * spread - low
    return int(((at >= 0) & (at % holes == 0) & (at // holes < inputs)).sum())


def _pairs_of_tokens(query: Shape, key: Shape, *, heads_first: bool) -> int:
    """Operations of one product over all pairs: arrays are [..., heads, n, head_dim], or [b, n, heads, head_dim]."""
    tokens = key.sizes[-2 if heads_first else -3]
    return 2 * query.elements * tokens


def _custom_call(computation: Computation, instruction: Instruction) -> int:
    name = kernel(instruction) or ""
    for pattern, products in ATTENTION.items():
        if re.search(pattern, name):
            floating = [one.shapes[0] for one in computation.operands(instruction) if one.shapes[0].dtype in FLOATING]
            query, key = [array for array in floating if len(array.sizes) > 2][:2]
            return products * _pairs_of_tokens(query, key, heads_first="splash" in name)
    if name.startswith("__cublas"):
        config = json.loads(re.search(r"backend_config=(\{.*\})", instruction.attributes)[1])  # pyright: ignore
        dims = config["gemm_backend_config"]["dot_dimension_numbers"]["lhs_contracting_dimensions"]
        left = computation.operands(instruction)[0].shapes[0]
        return 2 * instruction.shapes[0].elements * _contracted(left, [int(i) for i in dims])
    return 0
