"""norm_rope's kernels, interpreted on the CPU, against the three steps in plain jax, and the gradient."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.core.device import compiling_for
from pallas_kernels.norm_rope import api, from_kernels, norm_rope, reference
from pallas_kernels.norm_rope import gpu as norm_rope_gpu
from pallas_kernels.norm_rope import tpu as norm_rope_tpu
from tests.closeness import assert_close
from tests.kernels.interpreted import InterpretGPUParams, compiled_vjp

EPS = 1e-6
KERNELS = {
    "tpu": partial(norm_rope_tpu.forward, sizes={"block": 16}, interpret=True),
    "gpu": partial(norm_rope_gpu.forward, sizes={"block": 16}, interpret=InterpretGPUParams()),
}


def draw(b: int, n: int, heads: int, head_dim: int, dtype, *, samples: int = 1, scales: int = 0):
    """Features, weight, tables of angles of so many samples (0: none), history scales (0: none)."""
    rng = np.random.default_rng()
    angles = rng.uniform(0, 6, (samples, n, head_dim // 2))
    table = (jnp.cos(angles), jnp.sin(angles)) if samples else None
    x = jnp.asarray(rng.standard_normal((b, n, heads * head_dim)), dtype)
    weight = jnp.asarray(rng.standard_normal(heads * head_dim), jnp.float32)
    return x, weight, table, jnp.asarray(rng.uniform(1, 10, scales), jnp.float32) if scales else None


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("b", "n", "heads", "head_dim", "dtype", "samples", "scales", "num_history"),
    [
        (1, 1, 2, 128, jnp.float32, 1, 0, 0),
        (2, 37, 4, 64, jnp.float32, 2, 4, 20),  # a scale a head, in a block with tokens of both kinds
        (2, 20, 3, 128, jnp.bfloat16, 1, 1, 20),  # one scale for all heads, and no noisy tokens
        (1, 20, 2, 64, jnp.float32, 0, 0, 0),  # no positions: queries to the text
    ],
)
def test_values_equal_the_reference(kernel, b, n, heads, head_dim, dtype, samples, scales, num_history):
    x, weight, table, scale = draw(b, n, heads, head_dim, dtype, samples=samples, scales=scales)
    forward = partial(from_kernels, KERNELS[kernel], heads=heads, eps=EPS, num_history=num_history)
    # Not Mosaic GPU's interpreter, see `compiled_vjp`.
    got = (forward if kernel == "gpu" else jax.jit(forward))(x, weight, table=table, history_scale=scale)
    plain = jax.jit(partial(reference, heads=heads, eps=EPS, num_history=num_history))
    expected = plain(x, weight, table=table, history_scale=scale)
    assert got.dtype == dtype
    assert_close(got, expected, dtype=dtype)


def test_32k_tokens():
    x, weight, table, scale = draw(1, 32768, 1, 128, jnp.float32, scales=1)
    forward = partial(norm_rope_tpu.forward, sizes={"block": 4096}, interpret=True)
    got = from_kernels(forward, x, weight, 1, EPS, table, scale, 9000)
    assert_close(got, reference(x, weight, 1, EPS, table, scale, 9000))


BACKWARD = partial(norm_rope_tpu.backward, sizes={"block": 16}, interpret=True)


@pytest.mark.parametrize(
    ("head_dim", "n", "samples", "scales", "num_history", "dtype", "backward"),
    [
        (64, 5, 1, 2, 3, jnp.float32, None),  # by XLA
        (128, 37, 2, 2, 20, jnp.float32, BACKWARD),  # blocks of both kinds of tokens, and one beyond the last
        (128, 16, 1, 1, 16, jnp.float32, BACKWARD),  # one scale for all heads, no noisy tokens
        (128, 20, 0, 0, 0, jnp.float32, BACKWARD),  # no positions
        (128, 37, 1, 2, 20, jnp.bfloat16, BACKWARD),
    ],
)
def test_gradients_equal_the_reference(head_dim, n, samples, scales, num_history, dtype, backward):
    x, weight, table, scale = draw(2, n, 2, head_dim, dtype, samples=samples, scales=scales)
    noise = np.random.default_rng().standard_normal((2, n, 2, head_dim))
    # Along the output, so that a scale's gradient, one sum over all features, does not cancel to rounding errors.
    cotangent = reference(x, weight, 2, EPS, table, scale, num_history) + jnp.asarray(noise, dtype)

    def ours(x, weight, table, scale):
        return from_kernels(KERNELS["tpu"], x, weight, 2, EPS, table, scale, num_history, backward=backward)

    def theirs(x, weight, table, scale):
        return reference(x, weight, 2, EPS, table, scale, num_history)

    (_, got), (_, expected) = (compiled_vjp(f, (x, weight, table, scale), cotangent) for f in (ours, theirs))
    assert_close(got, expected, dtype=dtype)


def test_unsupported_calls_give_the_reason():
    x, weight, table, _ = draw(1, 2, 2, 64, jnp.float32)
    with pytest.raises(ValueError, match=r"runs on cpu.*implementation='xla'"):
        norm_rope(x, weight, 2, EPS, table, implementation="pallas")
    hopper = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100")
    with compiling_for(hopper), pytest.raises(ValueError, match="head_dim 64 and 128, not 32"):
        norm_rope(x, weight, 4, EPS, implementation="pallas")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_turning_whole_heads_has_the_same_gradients(dtype):
    """Bit for bit: the pairs are exchanged by a product with a permutation."""
    keys = jax.random.split(jax.random.key(0), 3)
    y, gradient = (jax.random.normal(key, (2, 7, 3, 64), dtype) for key in keys[:2])
    angles = 6 * jax.random.uniform(keys[2], (1, 7, 32))
    table = (jnp.cos(angles), jnp.sin(angles))
    expected, found = (compiled_vjp(turn, (y, table), gradient) for turn in (api.turn_pairs, api.turn_heads))
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert (one == other).all()
