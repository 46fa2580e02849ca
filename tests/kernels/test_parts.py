"""Float32 as bfloat16 parts: the sum is exact, and products of parts equal a float32 product."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import parts


def draw(*shape: int, seed: int = 0):
    """Numbers of both signs over 40 orders of magnitude."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * 10.0 ** rng.integers(-20, 20, shape)).astype(np.float32)


def test_parts_sum_to_the_array():
    x = draw(2, 3, 5, 64)
    split = jax.jit(parts.split)(x)
    assert split.dtype == jnp.bfloat16
    assert split.shape == (2, 3, 15, 64)
    np.testing.assert_array_equal(parts.joined(split, jnp.float32), x)
    first, second, third = np.split(np.asarray(split, np.float32), 3, 2)
    assert np.all(np.abs(second) <= np.abs(first) * 2.0**-8)
    assert np.all(np.abs(third) <= np.abs(first) * 2.0**-16)


def test_bfloat16_has_one_part():
    x = jnp.asarray(draw(1, 2, 3, 64), jnp.bfloat16)
    np.testing.assert_array_equal(parts.split(x), x)
    np.testing.assert_array_equal(parts.joined(x, jnp.bfloat16), x)


def test_six_part_products_equal_a_float32_product():
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(64).astype(np.float32) for _ in range(2))
    ours = [np.asarray(x, np.float64) for x in parts.of(jnp.asarray(a), 3)]
    theirs = [np.asarray(x, np.float64) for x in parts.of(jnp.asarray(b), 3)]
    got = sum(ours[i] * theirs[j] for i, j in parts.PAIRS[3])
    exact = a.astype(np.float64) * b.astype(np.float64)
    np.testing.assert_allclose(got, exact, rtol=2.0**-24)
