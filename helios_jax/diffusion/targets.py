"""Flow matching: noisy latents, the velocity to be predicted, times, weights, the loss.

Everything random comes in as an argument, so that recorded draws give the reference's numbers (`train_helios.py`:
prepare_stage1_noise_input, prepare_stage2_clean_input, _flow_loss).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Key

from helios_jax.diffusion.noising import add_noise, velocity
from helios_jax.diffusion.pyramid import downsample, upsample
from helios_jax.diffusion.schedule import LevelRange, Shift, shift, training_shift

STEPS = 1000  # of the training schedule, and of each level of the pyramid


@dataclass(unsafe_hash=True)
class TimesConfig:
    """Distribution of times, and the weight of each time's error (the weighting schemes of the SD3 paper).

    "logit_normal" and "mode" draw some times more often; "cosmap" and "sigma_sqrt" draw uniformly and weight the
    error; "none" does neither. `shift` moves times towards noise, further for more tokens: "linear" by
    mu itself, as upstream's training does for every time_shift_type, "exponential" by exp(mu), at most 7.
    """

    weighting: Literal["none", "logit_normal", "mode", "cosmap", "sigma_sqrt"] = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    shift: Shift = None

    def __post_init__(self) -> None:
        if self.logit_std <= 0:
            raise ValueError(f"logit_std must be above 0, got {self.logit_std}")


# Fields are not annotated with shapes: jax also puts objects that are no arrays into pytrees.
@struct.dataclass
class FlowSample:
    """`noisy` [b, t, h, w, c] at `sigma` [b] (1 is the start of its path), the velocity `target` of the same shape, and
    the `timestep` [b] that the model is given, 0 to 1000."""

    noisy: Any
    target: Any
    sigma: Any
    timestep: Any


def draw_quantile(keys: Key[Array, " b"], config: TimesConfig) -> Float[Array, " b"]:
    """Draws each sample's place on the schedule, from 0 at noise to 1 at data."""
    if config.weighting == "logit_normal":
        normal = jax.vmap(jax.random.normal)(keys)
        return jax.nn.sigmoid(config.logit_mean + config.logit_std * normal)
    u = jax.vmap(jax.random.uniform)(keys)
    if config.weighting == "mode":
        u = 1 - u - config.mode_scale * (jnp.square(jnp.cos(math.pi * u / 2)) - 1 + u)
    return u


def loss_weight(sigma: Float[Array, " b"], config: TimesConfig) -> Float[Array, " b"]:
    """Weight of the error at `sigma`."""
    if config.weighting == "sigma_sqrt":
        return sigma**-2.0
    if config.weighting == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * jnp.square(sigma)))
    return jnp.ones_like(sigma)


def straight_sample(
    latents: Float[Array, "b t h w c"],
    noise: Float[Array, "b t h w c"],
    quantile: Float[Array, " b"],
    config: TimesConfig,
) -> FlowSample:
    """Noisy samples on the straight path from noise to latents, for stage 1."""
    sigma = shift((STEPS - _step(quantile)) / STEPS, training_shift(latents.shape, config.shift))
    return FlowSample(add_noise(latents, noise, sigma), velocity(latents, noise), sigma, sigma * STEPS)


def pyramid_samples(
    latents: Float[Array, "b t h w c"],
    noise: Float[Array, "b t h w c"],
    quantiles: Sequence[Sequence[Float[Array, " b"]]],
    levels: Sequence[LevelRange],
    config: TimesConfig,
) -> list[FlowSample]:
    """Noisy samples on the paths of all levels, coarsest first, one for each quantile of a level; for stage 2.

    A level goes from the level below, upsampled and mixed with noise at the level's start, to the latents at its own
    size, mixed with noise at its end. All levels share one noise, downsampled like the latents and kept at variance 1.
    """
    clean, noises = [latents], [noise]
    for _ in levels[1:]:
        clean.append(downsample(clean[-1]))
        noises.append(2 * downsample(noises[-1]))
    clean.reverse()
    noises.reverse()
    samples = []
    for i, (level, drawn) in enumerate(zip(levels, quantiles, strict=True)):
        start = noises[i]
        if i > 0:
            start = add_noise(upsample(clean[i - 1]), noises[i], jnp.float32(level.start))
        end = add_noise(clean[i], noises[i], jnp.float32(level.end))
        high, low = level.timesteps
        for quantile in drawn:
            step = _step(quantile)
            timestep = high + (low - high) * step / (STEPS - 1)
            sigma = 0.999 * (STEPS - step) / STEPS
            if config.shift is not None:
                sigma = shift(sigma, training_shift(start.shape, config.shift))
                timestep = low + (high - low) * sigma
            samples.append(FlowSample(add_noise(end, start, sigma), velocity(end, start), sigma, timestep))
    return samples


def flow_loss(velocity: Float[Array, "b t h w c"], sample: FlowSample, config: TimesConfig) -> Float[Array, " b"]:
    """Weighted mean squared error of each sample's velocity, in float32."""
    error = jnp.square(velocity.astype(jnp.float32) - sample.target).mean((1, 2, 3, 4))
    return loss_weight(sample.sigma, config) * error


def _step(quantile: Float[Array, " b"]) -> Float[Array, " b"]:
    return jnp.clip(jnp.floor(quantile * STEPS), 0, STEPS - 1)
