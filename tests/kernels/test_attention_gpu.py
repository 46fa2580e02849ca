"""Pallas attention for Hopper, interpreted on the CPU, against softmax(q k^T) v: values and gradients at any length."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import gpu as attention_gpu
from pallas_kernels.attention import reference
from pallas_kernels.core.tiles import lookup
from tests.closeness import assert_close
from tests.kernels.interpreted import InterpretGPUParams, compiled_vjp, vjp
from tests.kernels.test_attention import pieces

# Like TMA, the interpreter reads zeros beyond an end.
INTERPRET = InterpretGPUParams(out_of_bounds_reads="uninitialized", uninitialized_memory="zero")
# Far below the hardware's sizes.
TILES = {
    "attention": {"block_q": 8, "block_k": 8, "slots": 2},
    "attention_dq": {"block_q": 16, "block_k": 8, "slots": 2},
    "attention_dkv": {"block_q": 8, "block_k": 16, "slots": 2},
}


@pytest.mark.parametrize(
    ("b", "n", "m", "heads", "head_dim", "lengths", "dtype"),
    [
        (1, 1, 1, 2, 64, None, jnp.bfloat16),
        # No length is a multiple of a block, n not even of the 8 rows that are copied at once; the third block takes
        # the slot of the first; keys of the first row are hidden, whole blocks of them.
        (2, 21, 24, 1, 128, (5, 24), jnp.bfloat16),
        (1, 13, 24, 2, 64, (5,), jnp.float32),
    ],
)
def test_values_and_gradients_equal_the_reference(b, n, m, heads, head_dim, lengths, dtype):
    rng = np.random.default_rng(0)
    q, k, v, cotangent = (rng.standard_normal((b, length, heads, head_dim)) for length in (n, m, m, n))
    if lengths is not None:
        k[0, lengths[0] :] *= 1000  # hidden values must not matter
        lengths = jnp.asarray(lengths)
    inputs = [jnp.asarray(x, dtype) for x in (q, k, v)]
    wide, cotangent = [x.astype(jnp.float32) for x in inputs], jnp.asarray(cotangent, jnp.float32)
    got, ours = vjp(lambda *x: attention_gpu.attention(*x, lengths, TILES, interpret=INTERPRET), inputs, cotangent)
    expected, theirs = compiled_vjp(lambda *x: reference(*x, lengths), wide, cotangent)
    assert got.dtype == dtype
    assert_close((got, *ours), (expected, *theirs), dtype=dtype, terms=1)


def test_dtypes_have_their_own_sizes():
    for dtype in (jnp.bfloat16, jnp.float32):
        for name in attention_gpu.tables(dtype).values():
            assert lookup(name, "NVIDIA H100 80GB HBM3", 11040)
    assert attention_gpu.tables(jnp.float32)["attention_dq"] == "attention_dq_float32"


def test_pieces_of_the_keys_merge():
    """As around a ring of devices, of which one may have nothing but padding."""
    got, expected = pieces(attention_gpu, TILES, (0, 7), jnp.bfloat16, 64, INTERPRET)
    assert_close(got, expected, dtype=jnp.bfloat16, terms=1)
