"""The gated residual's kernels, interpreted on the CPU, against the sum and its norm in plain jax, with gradients."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.adaln import gpu as adaln_gpu
from pallas_kernels.adaln import tpu as adaln_tpu
from pallas_kernels.gated_residual import from_kernels, gated_residual, reference
from pallas_kernels.gated_residual import gpu as gated_residual_gpu
from pallas_kernels.gated_residual import tpu as gated_residual_tpu
from tests.closeness import assert_close
from tests.kernels.interpreted import InterpretGPUParams, compiled_vjp, vjp

EPS = 1e-6
SIZES = {"block": 32}
KERNELS = {
    "tpu": [partial(f, sizes=SIZES, interpret=True) for f in (gated_residual_tpu.forward, adaln_tpu.backward)],
    "gpu": [
        partial(f, sizes=SIZES, interpret=InterpretGPUParams())
        for f in (gated_residual_gpu.forward, adaln_gpu.backward)
    ],
}


def draw(b: int, first: int, runs: tuple[int, ...], d: int, dtype):
    """x, y, gate, shift and gain (the last two shared by the samples), and cotangents of both outputs."""
    rng, m = np.random.default_rng(), sum(runs)
    tokens, tables = (b, first + m, d), (len(runs), d)
    shapes = tokens, tokens, (b, *tables), (1, *tables), (1, *tables)
    types = dtype, dtype, jnp.float32, jnp.float32, jnp.float32
    inputs = [jnp.asarray(rng.standard_normal(shape), of) for shape, of in zip(shapes, types)]
    return inputs, tuple(jnp.asarray(rng.standard_normal((b, m, d)), dtype) for _ in range(2))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("b", "first", "runs", "d", "dtype"),
    [
        (1, 0, (1,), 128, jnp.float32),
        (2, 48, (7, 30), 128, jnp.float32),  # what comes before is not touched; a block has tokens of both runs
        (1, 16, (20,), 256, jnp.bfloat16),
    ],
)
def test_values_and_gradients_equal_the_reference(kernel, b, first, runs, d, dtype):
    inputs, cotangents = draw(b, first, runs, d, dtype)
    expected, wanted = compiled_vjp(lambda *args: reference(*args, runs, EPS), inputs, cotangents)
    got, found = (vjp if kernel == "gpu" else compiled_vjp)(
        lambda *args: from_kernels(*KERNELS[kernel], *args, runs, EPS), inputs, cotangents
    )
    for ours, theirs in zip((*got, *found), (*expected, *wanted), strict=True):
        assert ours.dtype == theirs.dtype
        assert_close(ours, theirs, dtype=dtype)


def test_32k_tokens():
    inputs, _ = draw(1, 8192, (24576,), 128, jnp.float32)
    forward = partial(gated_residual_tpu.forward, sizes={"block": 4096}, interpret=True)
    assert_close(from_kernels(forward, None, *inputs, (24576,), EPS), reference(*inputs, (24576,), EPS))


def test_invalid_calls_give_the_reason():
    inputs, _ = draw(1, 0, (5,), 128, jnp.float32)
    with pytest.raises(ValueError, match=r"runs on cpu.*implementation='xla'"):
        gated_residual(*inputs, (5,), EPS, implementation="pallas")
    with pytest.raises(ValueError, match=r"runs \(6,\) have the sum 6, and there are 5 tokens"):
        gated_residual(*inputs, (6,), EPS)
