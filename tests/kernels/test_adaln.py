"""adaLN's kernels, interpreted on the CPU, against layer norm and modulation in plain jax: values and gradients."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.adaln import adaln, from_kernels, reference
from pallas_kernels.adaln import gpu as adaln_gpu
from pallas_kernels.adaln import tpu as adaln_tpu
from tests.closeness import assert_close
from tests.kernels.interpreted import InterpretGPUParams, compiled_vjp, vjp

SIZES = {"block": 16}
KERNELS = {"tpu": (adaln_tpu, True, SIZES), "gpu": (adaln_gpu, InterpretGPUParams(), SIZES)}
EPS = 1e-6


def draw(b: int, runs: tuple[int, ...], d: int, dtype, *, samples: int):
    """Tokens, shift and scale of `samples` tables, and a cotangent."""
    rng, n = np.random.default_rng(), sum(runs)
    shapes = (b, n, d), (samples, len(runs), d), (samples, len(runs), d), (b, n, d)
    types = dtype, jnp.float32, jnp.float32, dtype
    return [jnp.asarray(rng.standard_normal(shape), of) for shape, of in zip(shapes, types)]


def agree(ours, theirs, dtype, *, of: str):
    assert ours.dtype == theirs.dtype
    assert_close({of: ours}, {of: theirs}, dtype=dtype)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("b", "runs", "d", "dtype", "samples"),
    [
        (1, (1,), 256, jnp.bfloat16, 1),
        (2, (20, 17), 128, jnp.float32, 2),  # a block has tokens of both runs, and the last is not full
        (2, (3, 5, 33), 128, jnp.bfloat16, 1),  # one table for both samples, several runs in one block
    ],
)
def test_values_and_gradients_equal_the_reference(kernel, b, runs, d, dtype, samples):
    module, interpret, sizes = KERNELS[kernel]
    *inputs, cotangent = draw(b, runs, d, dtype, samples=samples)
    forward, backward = (partial(f, sizes=sizes, interpret=interpret) for f in (module.forward, module.backward))
    expected, wanted = compiled_vjp(lambda *args: reference(*args, runs, EPS), inputs, cotangent)
    got, found = (vjp if kernel == "gpu" else compiled_vjp)(
        lambda *args: from_kernels(forward, backward, *args, runs, EPS), inputs, cotangent
    )
    names = ("values", "x", "shift", "scale")
    for of, ours, theirs in zip(names, (got, *found), (expected, *wanted), strict=True):
        agree(ours, theirs, dtype, of=of)


def test_32k_tokens():
    runs = (9000, 23768)
    *inputs, cotangent = draw(1, runs, 128, jnp.float32, samples=1)
    sizes = {"block": 4096}
    forward, backward = (partial(f, sizes=sizes, interpret=True) for f in (adaln_tpu.forward, adaln_tpu.backward))
    expected, wanted = compiled_vjp(lambda *args: reference(*args, runs, EPS), inputs, cotangent)
    got, found = compiled_vjp(lambda *args: from_kernels(forward, backward, *args, runs, EPS), inputs, cotangent)
    agree(got, expected, jnp.float32, of="values")
    assert_close(found, wanted)


def test_gpu_blocks_hold_tokens_of_one_run():
    assert adaln_gpu.spans((5, 1, 4), 4).tolist() == [[0, 4, 0], [4, 5, 0], [5, 6, 1], [6, 10, 2]]


def test_invalid_calls_give_the_reason():
    x, shift, scale, _ = draw(1, (2, 3), 128, jnp.float32, samples=1)
    with pytest.raises(ValueError, match=r"runs on cpu.*implementation='xla'"):
        adaln(x, shift, scale, (2, 3), EPS, implementation="pallas")
    with pytest.raises(ValueError, match=r"runs \(2, 2\).*the sum 5"):
        adaln(x, shift, scale, (2, 2), EPS)
    with pytest.raises(ValueError, match="a table has shape"):
        adaln(x, shift[:, :1], scale, (2, 3), EPS)
