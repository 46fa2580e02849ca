"""What XLA makes of the model for an H100: which libraries it calls, what it copies, how much memory it takes."""

import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from helios_jax import compile as compilation
from pallas_kernels import attention_gpu
from pallas_kernels.attention import reference
from pallas_kernels.tiles import lookup
from tests.aot import programs

GB = 10**9
CAPACITY = 80 * GB


def bytes_of(tree) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def test_block_is_libraries_and_fusions(h100, report):
    function, arguments = programs.block()
    arguments = compilation.on_device(arguments, h100)
    program = compilation.compiled(function, *arguments, platform="gpu", donate=(1,))
    text, calls = program.as_text(), compilation.custom_calls(program)
    assert calls == {"__cudnn$fmhaSoftmax": 2, "__cublas$lt$matmul": 8, "mosaic_gpu_v2": 3}
    epilogues = Counter(re.findall(r'"epilogue":"(\w+)"', text))
    assert epilogues == {"BIAS": 7, "BIAS_GELU": 1}, "a bias or the GELU is a kernel of its own"
    assert not re.findall(r"= bf16\[1,11040\S* (?:copy|transpose)\(", text[text.index("ENTRY") :])
    assert report("block, 11040 tokens", h100, program).temporaries < 0.6 * GB


@pytest.fixture(scope="module")
def decoder(h100):
    function, arguments = programs.decoder()
    return compilation.compiled(function, *compilation.on_device(arguments, h100), platform="gpu")


def test_convolutions_run_as_they_lie(decoder, h100, report):
    text = decoder.as_text()
    assert compilation.custom_calls(decoder)["__cudnn$convBiasActivationForward"] == 39
    # Weights are transposed, [in, out] to [out, in]; what flows through may be so around the one attention only.
    turned = re.findall(r"= bf16\[([\d,]+)\]\S* transpose\(", text)
    large = [sizes for sizes in turned if math.prod(map(int, sizes.split(","))) > 3 * 9 * 48 * 80 * 384]
    assert not large, "activations are transposed around convolutions"
    assert report("VAE decoder, 33 x 384 x 640", h100, decoder).temporaries < 7 * GB


def test_the_sampler_fits(decoder, h100, report):
    function, arguments = programs.transformer()
    program = compilation.compiled(function, *compilation.on_device(arguments, h100), platform="gpu")
    memory = report("transformer, 40 blocks, 11040 tokens", h100, program)
    assert compilation.custom_calls(program)["__cudnn$fmhaSoftmax"] == 80
    assert memory.temporaries < 1.2 * GB, "stacked weights or attention's logits are copied"
    passes = memory.outputs + memory.temporaries
    weights = bytes_of(arguments) + bytes_of(programs.decoder()[1])
    peak = weights + max(passes, compilation.memory(decoder).temporaries + compilation.memory(decoder).outputs)
    print(f"sampler on an H100: weights, text and history {weights / GB:.1f} GB, peak {peak / GB:.1f} GB")
    assert peak < 0.6 * CAPACITY


@pytest.mark.parametrize("head_dim", [64, 128])
def test_pallas_attention_compiles(h100, report, head_dim):
    q = compilation.on_device(programs.shape(1, 11040, 40, head_dim), h100)
    tiles = lookup("attention", h100.device_kind, 11040)
    program = compilation.compiled(
        lambda q, k, v: attention_gpu.attention(q, k, v, None, tiles), q, q, q, platform="gpu"
    )
    assert compilation.custom_calls(program) == {"mosaic_gpu_v2": 1}
    assert report(f"Pallas attention, head_dim {head_dim}", h100, program).temporaries < 0.15 * GB  # one padded output


def test_pallas_attention_has_the_references_values():
    """Interpreted: neither length is a multiple of a block, and there are padded keys. Here, as it takes a minute."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, n, 1, 64)), jnp.bfloat16) for n in (70, 200, 200))
    lengths = jnp.asarray([150])
    beyond_are_zeros = InterpretGPUParams(out_of_bounds_reads="uninitialized", uninitialized_memory="zero")
    tiles = {"block_q": 64, "block_k": 64, "slots": 2}  # the third block takes the slot of the first
    got = attention_gpu.attention(q, k, v, lengths, tiles, interpret=beyond_are_zeros)
    expected = reference(q, k, v, lengths)
    np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(expected, np.float32), atol=0.01)
