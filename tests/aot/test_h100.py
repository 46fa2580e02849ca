"""The model compiled for an H100: libraries called, copies, memory."""

import math
import re
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from helios_jax.models.ops.choices import Implementations
from helios_jax.runtime import aot
from helios_jax.runtime.compilation import precise
from pallas_kernels.attention import attention
from tests.aot import programs

GB = 10**9
CAPACITY = 80 * GB


def bytes_of(tree) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def test_block_is_libraries_and_fusions(h100, report):
    function, arguments = programs.block()
    arguments = aot.on_device(arguments, h100)
    program = aot.compiled(function, *arguments, platform="gpu", donate=(1,))
    text, calls = program.as_text(), programs.custom_calls(program)
    assert calls == {"__cudnn$fmhaSoftmax": 2, "__cublas$lt$matmul": 8}
    epilogues = Counter(re.findall(r'"epilogue":"(\w+)"', text))
    assert epilogues == {"BIAS": 7, "BIAS_GELU": 1}, "a bias or the GELU is a kernel of its own"
    assert not re.findall(r"= bf16\[1,11040\S* (?:copy|transpose)\(", text[text.index("ENTRY") :])
    assert report("block, 11040 tokens", h100, program).temporaries < 0.6 * GB


@pytest.mark.parametrize("norms", ["xla", "pallas"])
def test_a_block_of_few_tokens_is_padded_outside(h100, report, norms):
    """2940 tokens: XLA would pad them before each product, and slice after it."""
    function, arguments = programs.block(Implementations("cudnn", norms), noisy=540)
    program = aot.compiled(function, *aot.on_device(arguments, h100), platform="gpu", donate=(1,))
    assert not re.findall(r"= \w+\[(?:\d+,)*2940\b", program.as_text()), "something has the length without padding"
    epilogues = Counter(re.findall(r'"epilogue":"(\w+)"', program.as_text()))
    assert epilogues == {"BIAS": 7, "BIAS_GELU": 1}
    assert report(f"block, 2940 tokens, norms by {norms}", h100, program).temporaries < 0.2 * GB


@pytest.fixture(scope="module")
def decoder(h100):
    function, arguments = programs.decoder()
    return aot.compiled(function, *aot.on_device(arguments, h100), platform="gpu")


def test_convolutions_run_as_they_lie(decoder, h100, report):
    text = decoder.as_text()
    assert programs.custom_calls(decoder)["__cudnn$convBiasActivationForward"] == 39
    # Weights are transposed, [in, out] to [out, in]; what flows through may be so around the one attention only.
    turned = re.findall(r"= bf16\[([\d,]+)\]\S* transpose\(", text)
    large = [sizes for sizes in turned if math.prod(map(int, sizes.split(","))) > 3 * 9 * 48 * 80 * 384]
    assert not large, "activations are transposed around convolutions"
    assert report("VAE decoder, 33 x 384 x 640", h100, decoder).temporaries < 7 * GB


def test_the_sampler_fits(decoder, h100, report):
    function, arguments = programs.transformer()
    program = aot.compiled(function, *aot.on_device(arguments, h100), platform="gpu")
    memory = report("transformer, 40 blocks, 11040 tokens", h100, program)
    assert programs.custom_calls(program)["__cudnn$fmhaSoftmax"] == 80
    assert memory.temporaries < 1.2 * GB, "stacked weights or attention's logits are copied"
    passes = memory.outputs + memory.temporaries
    weights = bytes_of(arguments) + bytes_of(programs.decoder()[1])
    peak = weights + max(passes, aot.memory(decoder).temporaries + aot.memory(decoder).outputs)
    print(f"sampler on an H100: weights, text and history {weights / GB:.1f} GB, peak {peak / GB:.1f} GB")
    assert peak < 0.6 * CAPACITY


@pytest.mark.parametrize("head_dim", [64, 128])
def test_pallas_attention(h100, report, head_dim):
    q = aot.on_device(programs.shape(1, 11040, 40, head_dim), h100)
    values = aot.compiled(partial(attention, implementation="pallas"), q, q, q, platform="gpu")
    assert programs.custom_calls(values) == {"mosaic_gpu_v2": 1}
    assert report(f"Pallas attention, head_dim {head_dim}", h100, values).temporaries < 1e6, "an argument is copied"
    gradients = aot.compiled(attention_gradients, q, q, q, q, platform="gpu")
    assert programs.custom_calls(gradients) == {"mosaic_gpu_v2": 3}
    memory = report(f"Pallas attention, gradients, head_dim {head_dim}", h100, gradients)
    assert memory.temporaries < 1e7, "more than two numbers a row and head"


@pytest.mark.parametrize("head_dim", [64, 128])
def test_pallas_attention_in_float32(h100, report, head_dim):
    q = aot.on_device(programs.shape(1, 11040, 40, head_dim, dtype=jnp.float32), h100)
    parts = 6 * math.prod(q.shape)  # bytes
    values = aot.compiled(partial(attention, implementation="pallas"), q, q, q, platform="gpu")
    assert programs.custom_calls(values) == {"mosaic_gpu_v2": 1}
    memory = report(f"float32 Pallas attention, head_dim {head_dim}", h100, values)
    assert memory.temporaries < 4 * parts + 1e7, "more than the parts of three arguments and the output"
    gradients = aot.compiled(attention_gradients, q, q, q, q, platform="gpu")
    assert programs.custom_calls(gradients) == {"mosaic_gpu_v2": 3}
    memory = report(f"float32 Pallas attention, gradients, head_dim {head_dim}", h100, gradients)
    assert memory.temporaries < 8 * parts


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (70, 123), (32760, 32760)])
def test_pallas_attention_of_any_length(h100, n, m, dtype):
    """By default blocks; TMA is particular about strides and ends."""
    q, k = (aot.on_device(programs.shape(2, length, 4, 128, dtype=dtype), h100) for length in (n, m))
    program = aot.compiled(attention_gradients, q, k, k, q, platform="gpu")
    assert programs.custom_calls(program) == {"mosaic_gpu_v2": 3}


def test_block_by_kernels(h100, report):
    function, arguments = programs.block(Implementations("pallas", "pallas"))
    program = aot.compiled(function, *aot.on_device(arguments, h100), platform="gpu", donate=(1,))
    # Attention's two; queries and keys of self-attention, and its residual with the norm after it.
    assert programs.custom_calls(program) == {"mosaic_gpu_v2": 2 + 3, "__cublas$lt$matmul": 8}
    assert report("block, 11040 tokens, by Pallas", h100, program).temporaries < 0.7 * GB


@pytest.mark.parametrize(("implementation", "most"), [("xla", 4 * GB), ("pallas", 2 * GB)])
def test_block_in_float32(h100, report, implementation, most):
    function, arguments = programs.block(Implementations(implementation, implementation), jnp.float32)
    with precise(jnp.float32):
        program = aot.compiled(function, *aot.on_device(arguments, h100), platform="gpu", donate=(1,))
    memory = report(f"float32 block, 11040 tokens, {implementation}", h100, program)
    assert memory.temporaries < most, "all of attention's logits are there at once"


def test_block_trains_by_kernels(h100, report):
    function, (block, x, *rest) = programs.block(Implementations("pallas", "pallas"))

    def loss(block, x, *rest):
        return function(block, x, *rest).astype(jnp.float32).sum()

    arguments = aot.on_device((block, x, *rest), h100)
    program = aot.compiled(jax.grad(loss, (0, 1, 4)), *arguments, platform="gpu")
    calls = programs.custom_calls(program)
    # Of self- and cross-attention each a forward and two backward kernels; of the norms three each way.
    assert calls["mosaic_gpu_v2"] == 6 + 6
    assert "__cudnn$fmhaSoftmax" not in calls
    assert report("block with gradients, Pallas attention", h100, program).temporaries < 4 * GB


def attention_gradients(q, k, v, cotangent):
    attend = partial(attention, implementation="pallas")
    return jax.vjp(attend, q, k, v)[1](cotangent)
