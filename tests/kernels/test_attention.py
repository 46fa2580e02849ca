"""Pallas attention for TPUs, interpreted on the CPU, against softmax(q k^T) v: values and gradients at any length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import attention, reference
from pallas_kernels.attention import tpu as attention_tpu
from pallas_kernels.core.tiles import lookup, table
from tests.closeness import assert_close

TILES = {
    "attention": {"block_q": 128, "block_k": 256, "block_k_compute": 128},
    "attention_dkv": {"block_q": 256, "block_k": 128, "block_k_compute": 128},
}


def draw(n: int, m: int, head_dim: int, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((2, length, 2, head_dim)), dtype) for length in (n, m, m, n)]


@pytest.mark.parametrize(
    ("n", "m", "head_dim", "dtype", "lengths"),
    [
        (1, 1, 64, jnp.float32, None),
        (200, 333, 128, jnp.float32, None),  # neither is a multiple of a block
        (128, 640, 64, jnp.float32, (1, 600)),  # padded keys, in some rows whole blocks of them
        (200, 300, 64, jnp.bfloat16, (70, 300)),
    ],
)
def test_values_and_gradients_equal_the_reference(n, m, head_dim, dtype, lengths):
    *inputs, cotangent = draw(n, m, head_dim, dtype)
    lengths = None if lengths is None else jnp.asarray(lengths)
    expected, expected_vjp = jax.vjp(lambda q, k, v: reference(q, k, v, lengths), *inputs)
    got, got_vjp = jax.vjp(lambda q, k, v: attention_tpu.attention(q, k, v, lengths, TILES, interpret=True), *inputs)
    assert got.dtype == dtype
    assert_close((got, *got_vjp(cotangent)), (expected, *expected_vjp(cotangent)), dtype=dtype, terms=1)


def test_blocks_pad_little():
    assert attention_tpu.block(1, 1024) == 128
    assert attention_tpu.block(1000, 1024) == 1024
    for length in (8640, 11040, 32760):
        size = attention_tpu.block(length, 1024)
        assert 512 <= size <= 1024
        assert size % 128 == 0
        assert -length % size < 256


def test_every_kind_of_device_has_sizes():
    assert lookup("attention", "TPU v5", 11040) == table()["attention"]["TPU v5"][""]
    assert lookup("attention", "TPU v5 lite", 11040) == table()["attention"]["TPU v5 lite"][""]
    assert lookup("attention", "TPU v9", 1) == table()["attention"]["TPU"][""]
    assert lookup("attention", "NVIDIA H100 80GB HBM3", 1) == table()["attention"]["NVIDIA"][""]


def test_unsupported_calls_give_the_reason():
    q, k, v, _ = draw(3, 3, 64)
    with pytest.raises(ValueError, match=r"runs on cpu.*implementation='xla'"):
        attention(q, k, v, implementation="pallas")
