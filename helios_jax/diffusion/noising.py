"""The straight path between data and noise: x = sigma * noise + (1 - sigma) * data, with velocity noise - data.

Every formula between data, noise, velocity and sigma is here, with arguments in that order. `sigma` has the first
dimensions of the arrays, such as [b] for [b, t, h, w, c].
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def add_noise(data: Float[Array, "*shape"], noise: Float[Array, "*shape"], sigma: Float[Array, "..."]) -> Array:
    """The point at `sigma`, 0 at the data and 1 at the noise."""
    sigma = _aligned(sigma, data)
    return sigma * noise + (1 - sigma) * data


def velocity(data: Float[Array, "*shape"], noise: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The derivative of the path with respect to sigma."""
    return noise - data


def predict_data(noisy: Float[Array, "*shape"], velocity: Float[Array, "*shape"], sigma: Float[Array, "..."]) -> Array:
    """The data of a point at `sigma` from its velocity, in float32 (convert_flow_pred_to_x0)."""
    return noisy.astype(jnp.float32) - _aligned(sigma, noisy) * velocity.astype(jnp.float32)


def _aligned(sigma: Float[Array, "..."], x: Array) -> Array:
    sigma = jnp.asarray(sigma)
    return sigma.reshape(*sigma.shape, *(1,) * (x.ndim - sigma.ndim))
