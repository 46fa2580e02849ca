"""Losses of stage 3 for the student, the critic and the discriminator (paper section 3.5).

Distribution matching (arXiv 2311.18828): a generated chunk is renoised and both scores predict its data: the frozen
teacher (real score) and the critic that follows the student (fake score). The student moves by their difference. All
random draws are arguments; docstrings name upstream's functions.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from helios_jax.diffusion.noising import predict_data
from helios_jax.diffusion.schedule import shift as shifted


@dataclass(unsafe_hash=True)
class RenoiseConfig:
    """Distribution of the noise added to a generated chunk before it is scored (upstream's sample_dynamic_timestep).

    "uniform", or "beta" with the parameters `alpha` and `beta`, which reach 1 along a cosine at training step `until`:
    more noise at first, uniform then; with `until` 0 they stay as they are. The times are shifted by the number of
    tokens and kept within [`smallest`, `largest`].
    """

    distribution: Literal["uniform", "beta"] = "uniform"
    alpha: float = 4.0
    beta: float = 1.5
    until: int = 500
    smallest: float = 0.02
    largest: float = 0.98

    def __post_init__(self) -> None:
        if min(self.alpha, self.beta) <= 0:
            raise ValueError(f"alpha and beta must be above 0, got {self.alpha} and {self.beta}")
        if self.until < 0:
            raise ValueError(f"until must not be negative, got {self.until}")
        if not 0 < self.smallest < self.largest < 1:
            raise ValueError(f"0 < smallest < largest < 1 must hold, got {self.smallest} and {self.largest}")


@dataclass(unsafe_hash=True)
class PenaltyConfig:
    """Approximate R1 or R2 penalty: logits must not change when noise of deviation `sigma` is added to the latents.

    The squared change counts `weight` times; with `per_sigma` it is divided by sigma^2 first, a finite difference
    (upstream's aprox_r1, aprox_r2 false).
    """

    weight: float = 100.0
    sigma: float = 0.1
    per_sigma: bool = False

    def __post_init__(self) -> None:
        if self.weight <= 0 or self.sigma <= 0:
            raise ValueError(f"weight and sigma must be above 0, got {self.weight} and {self.sigma}; null for none")


def draw_sigma(
    keys: Key[Array, " b"], config: RenoiseConfig, step: Int[Array, ""], shift: float = 1.0
) -> Float[Array, " b"]:
    """The noise levels of a training step; `shift` moves them towards noise when it is above 1."""
    if config.distribution == "uniform":
        t = jax.vmap(lambda key: jax.random.uniform(key, minval=1e-3))(keys)
    else:
        done = jnp.clip(step / config.until, 0, 1) if config.until else jnp.zeros(())
        left = 0.5 * (1 + jnp.cos(jnp.pi * done))
        alpha, beta = 1 + (config.alpha - 1) * left, 1 + (config.beta - 1) * left
        t = jax.vmap(lambda key: jax.random.beta(key, alpha, beta))(keys)
    if shift > 1:
        t = shifted(t, shift)
    return jnp.clip(t, config.smallest, config.largest)


def ode_loss(
    noisy: Float[Array, "b t h w c"],
    velocity: Float[Array, "b t h w c"],
    target: Float[Array, "b t h w c"],
    sigma: Float[Array, " b"],
) -> Float[Array, " b"]:
    """Half the mean squared error of the predicted end of the teacher's path (_ode_regression_loss)."""
    return 0.5 * jnp.square(predict_data(noisy, velocity, sigma) - target).mean((1, 2, 3, 4))


def dmd_gradient(
    made: Float[Array, "b t h w c"], real: Float[Array, "b t h w c"], fake: Float[Array, "b t h w c"]
) -> Float[Array, "b t h w c"]:
    """(fake - real) / mean |made - real| of each sample, for the two scores' predictions of `made` (compute_kl_grad).

    Values that are not finite become zero, as in upstream.
    """
    scale = jnp.abs(made - real).mean((1, 2, 3, 4), keepdims=True)
    return jnp.nan_to_num((fake - real) / scale)


def dmd_loss(made: Float[Array, "b t h w c"], gradient: Float[Array, "b t h w c"]) -> Float[Array, " b"]:
    """Half the mean square of `gradient`; its derivative by `made` is `gradient` over the number of values."""
    target = jax.lax.stop_gradient(made - gradient)
    return 0.5 * jnp.square(made - target).mean((1, 2, 3, 4))


def gan_loss(logits: Float[Array, "b heads"], real: bool) -> Float[Array, " b"]:
    """Softplus of the logits of `real` latents, which should be low, or of the negated logits of generated ones
    (cal_gan_loss)."""
    return jax.nn.softplus(logits if real else -logits).mean(1)


def penalty(
    logits: Float[Array, "b heads"], moved: Float[Array, "b heads"], config: PenaltyConfig
) -> Float[Array, " b"]:
    """Weighted mean square of `moved` - `logits`, where `moved` are the logits of latents with a little noise."""
    scale = config.sigma if config.per_sigma else 1.0
    return config.weight * jnp.square((moved - logits) / scale).mean(1)


def crop(latents: Float[Array, "b t h w c"], keys: Key[Array, " b"], size: tuple[int, int]) -> Array:
    """A window of height and width `size` of each sample, at a place drawn from its key (gan_crop_video_spatial)."""

    def one(x: Array, key: Array) -> Array:
        room = jnp.asarray([n - m + 1 for n, m in zip(x.shape[1:3], size)])
        top, left = jnp.floor(jax.random.uniform(key, (2,)) * room).astype(jnp.int32)
        return jax.lax.dynamic_slice(x, (0, top, left, 0), (x.shape[0], *size, x.shape[3]))

    return jax.vmap(one)(latents, keys)
