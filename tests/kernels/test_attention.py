"""Pallas attention for TPUs, interpreted on the CPU, against softmax(q k^T) v: values and gradients at any length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import attention, reference
from pallas_kernels.attention import tpu as attention_tpu
from pallas_kernels.core.tiles import lookup, table
from tests.closeness import assert_close
from tests.kernels.interpreted import compiled_vjp

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
    expected, wanted = compiled_vjp(lambda q, k, v: reference(q, k, v, lengths), inputs, cotangent)
    got, found = compiled_vjp(
        lambda q, k, v: attention_tpu.attention(q, k, v, lengths, TILES, interpret=True), inputs, cotangent
    )
    assert got.dtype == dtype
    assert_close((got, *found), (expected, *wanted), dtype=dtype, terms=1)


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


def pieces(kernels, tiles, lengths, dtype, head_dim, interpret):
    """Attention and its gradients, merged of two pieces of the keys, of which the second has `lengths`; and at once."""
    n, m = 9, 12
    *inputs, cotangent = draw(n, 2 * m, head_dim, dtype)
    q, k, v = inputs
    options = {"tiles": tiles, "interpret": interpret}
    cut = [(k[:, :m], v[:, :m], jnp.full(2, m)), (k[:, m:], v[:, m:], jnp.asarray(lengths))]
    outs, sums = zip(*(kernels.with_log_sums(q, k, v, length, **options) for k, v, length in cut))
    total = jnp.logaddexp(*sums)
    weights = [jnp.exp(x - total).swapaxes(1, 2)[..., None] for x in sums]
    out = sum(x.astype(jnp.float32) * weight for x, weight in zip(outs, weights))
    dots = jnp.einsum("bnhd,bnhd->bhn", out, cotangent.astype(jnp.float32))
    found = [kernels.gradients(q, k, v, cotangent, total, dots, length, **options) for k, v, length in cut]
    d_query = sum(x[0].astype(jnp.float32) for x in found)
    got = out, d_query, jnp.concatenate([x[1] for x in found], 1), jnp.concatenate([x[2] for x in found], 1)
    wide = [x.astype(jnp.float32) for x in inputs]
    expected, vjp = jax.vjp(lambda *x: reference(*x, m + jnp.asarray(lengths)), *wide)
    return got, (expected, *vjp(cotangent.astype(jnp.float32)))


def test_pieces_of_the_keys_merge():
    """As around a ring of devices, of which one may have nothing but padding."""
    got, expected = jax.jit(lambda: pieces(attention_tpu, TILES, (0, 7), jnp.float32, 64, True))()
    assert_close(got, expected, terms=1)
