"""Between the levels of the pyramid: sizes, variances, the noise's covariance, guidance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helios_jax.diffusion.guidance import guide
from helios_jax.diffusion.pyramid import block_noise, downsample, level_shapes, upsample
from helios_jax.diffusion.schedule import SchedulerConfig, level_ranges, upsampling_weights
from tests.closeness import assert_close


def test_block_noise_has_the_covariance_and_is_finite():
    white = jax.random.normal(jax.random.key(0), (4, 5, 64, 64, 2))
    noise = np.asarray(block_noise(white, 1 / 3))
    assert np.isfinite(noise).all()
    blocks = noise.reshape(4, 5, 32, 2, 32, 2, 2).transpose(0, 1, 2, 4, 6, 3, 5).reshape(-1, 4)
    expected = np.where(np.eye(4, dtype=bool), 1.0, -1 / 3)
    np.testing.assert_allclose(np.cov(blocks.T), expected, atol=0.02)
    assert np.abs(blocks.sum(1)).max() < 5e-3  # blocks sum to zero


def test_levels_have_the_shapes_of_downsampling():
    latents = jax.ShapeDtypeStruct((2, 9, 24, 40, 16), jnp.float32)
    half = jax.eval_shape(downsample, latents)
    quarter = jax.eval_shape(downsample, half)
    assert [(2, *shape) for shape in level_shapes((9, 24, 40, 16), 3)] == [quarter.shape, half.shape, latents.shape]


def test_downsampling_keeps_the_variance_of_noise_and_undoes_upsampling():
    noise = jax.random.normal(jax.random.key(1), (2, 3, 64, 64, 4))
    assert float(jnp.std(2 * downsample(noise))) == pytest.approx(1, abs=0.02)
    assert_close(downsample(upsample(noise)), noise)


def test_a_level_begins_on_the_path_of_its_noise_level():
    """Upsampled latents at sigma `entry` plus block noise have the variance of noise at the level's start."""
    config = SchedulerConfig()
    for stage in level_ranges(config)[1:]:
        alpha, beta = upsampling_weights(stage.entry, config.gamma)
        clean, white = jnp.zeros((1, 4, 64, 64, 2)), jax.random.normal(jax.random.key(2), (1, 4, 64, 64, 2))
        coarse = stage.entry * jax.random.normal(jax.random.key(3), downsample(clean).shape)
        sample = alpha * upsample(coarse) + beta * block_noise(white, config.gamma)
        assert float(jnp.std(sample)) == pytest.approx(stage.start, rel=0.03)
        blocks = sample.reshape(-1, 2)
        neighbours = jnp.mean(sample[:, :, :, 0::2] * sample[:, :, :, 1::2])
        assert abs(float(neighbours)) < 0.03 * float(jnp.mean(blocks**2))  # white again


def test_guidance():
    positive, negative = jax.random.normal(jax.random.key(4), (2, 3, 2, 2, 2, 1))
    plain = guide(positive, negative, jnp.asarray(3.0), project=False)
    assert_close(plain, 3 * positive - 2 * negative)
    # Projected, guidance does not see how long the negative velocity is.
    once, twice = (guide(positive, k * negative, jnp.asarray(3.0), project=True) for k in (1, 2))
    assert_close(once, twice)
