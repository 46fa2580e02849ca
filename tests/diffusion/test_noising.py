"""The path between data and noise: its ends, its slope, and data found again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helios_jax.diffusion.noising import add_noise, predict_data, velocity
from tests.closeness import assert_close


@pytest.mark.parametrize("sigma_shape", [(), (2,), (1, 3), (2, 3)])
def test_data_is_found_again_from_any_point_of_the_path(sigma_shape):
    rng = np.random.default_rng(0)
    data, noise = (jnp.asarray(rng.standard_normal((2, 3, 4, 5, 6)), jnp.float32) for _ in range(2))
    sigma = jnp.asarray(rng.uniform(0.05, 0.95, sigma_shape), jnp.float32)
    noisy = add_noise(data, noise, sigma)
    wide = np.asarray(sigma).reshape(*sigma_shape, *[1] * (5 - len(sigma_shape)))
    assert_close(noisy, data + wide * (noise - data))
    assert_close(predict_data(noisy, velocity(data, noise), sigma), data)


def test_the_path_goes_from_data_to_noise_at_its_velocity():
    data, noise = jnp.float32([1.0, -2.0]), jnp.float32([0.5, 3.0])
    assert (add_noise(data, noise, jnp.float32(0)) == data).all()
    assert (add_noise(data, noise, jnp.float32(1)) == noise).all()
    _, slope = jax.jvp(lambda s: add_noise(data, noise, s), (jnp.float32(0.3),), (jnp.float32(1),))
    assert_close(slope, velocity(data, noise))


def test_data_is_predicted_in_float32():
    half = jnp.ones((1, 2), jnp.bfloat16)
    assert predict_data(half, half, jnp.float32(0.5)).dtype == jnp.float32
