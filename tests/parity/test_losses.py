"""Losses of the flow stages on given draws: tables and weights of diffusers, equations of the paper."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.reference
torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from diffusers import FlowMatchEulerDiscreteScheduler, HeliosScheduler  # noqa: E402
from diffusers.training_utils import (  # noqa: E402
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
)

from helios_jax.diffusion.corruption import blur, saturate  # noqa: E402
from helios_jax.diffusion.schedule import SchedulerConfig, level_ranges  # noqa: E402
from helios_jax.diffusion.targets import (  # noqa: E402
    TimesConfig,
    draw_quantile,
    flow_loss,
    pyramid_samples,
    straight_sample,
)
from tests.parity.reference import channels_first, channels_last, check  # noqa: E402

WEIGHTINGS = ("none", "logit_normal", "mode", "cosmap", "sigma_sqrt")
SHAPES = ((3, 2, 8, 16, 5), (2, 9, 16, 8, 4))


def draws(shape, count=1):
    """Latents, noise, predictions and quantiles [count, b], with both ends among them."""
    rng = np.random.default_rng(shape)
    latents, noise, predicted = (rng.standard_normal(shape, np.float32) for _ in range(3))
    quantiles = rng.uniform(size=(count, shape[0])).astype(np.float32)
    quantiles[0, :2] = 0.0, 0.99999
    return latents, noise, predicted, quantiles


def shifted(sigma, tokens: int, kind: str | None):
    """Dynamic shifting, from 0.5 at 256 tokens to 1.15 at 4096; exponential at most by 7."""
    if kind is None:
        return sigma
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    factor = mu if kind == "linear" else min(math.exp(mu), 7.0)
    return factor * sigma / (1 + (factor - 1) * sigma)


def reference_loss(predicted, target, sigma, weighting: str):
    weight = compute_loss_weighting_for_sd3(weighting, sigma).float()
    return (weight * (predicted - target) ** 2).flatten(1).mean(1)


def samples_agree(stage: str, ours, noisy, target, sigma, timestep):
    check(f"{stage}, noised input", ours.noisy, channels_last(noisy), 1e-5)
    check(f"{stage}, target", ours.target, channels_last(target), 1e-5)
    check(f"{stage}, sigmas", ours.sigma, sigma.flatten().float(), 1e-5)
    check(f"{stage}, timesteps", ours.timestep, timestep.flatten().float(), 1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shift", [None, "linear", "exponential"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_stage_1(shape, shift, weighting):
    latents, noise, predicted, (quantile,) = draws(shape)
    config = TimesConfig(weighting=weighting, shift=shift)
    ours = straight_sample(jnp.asarray(latents), jnp.asarray(noise), jnp.asarray(quantile), config)

    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
    _, t, h, w, _ = shape
    table = shifted(scheduler.sigmas, t * h * w // 4, shift)
    sigma = table[(torch.from_numpy(quantile) * 1000).long()][:, None, None, None, None]
    x, z = channels_first(latents), channels_first(noise)
    samples_agree("stage 1", ours, (1 - sigma) * x + sigma * z, z - x, sigma, 1000 * sigma)
    loss = reference_loss(channels_first(predicted), z - x, sigma, weighting)
    check("stage 1, loss", flow_loss(jnp.asarray(predicted), ours, config), loss, 1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shift", [None, "linear", "exponential"])
@pytest.mark.parametrize("ratios", [(1, 2, 1), (2, 0, 1)])
def test_stage_2(shape, shift, ratios):
    latents, noise, _, quantiles = draws(shape, sum(ratios))
    config = TimesConfig(weighting="cosmap", shift=shift)
    drawn = [list(map(jnp.asarray, part)) for part in np.split(quantiles, np.cumsum(ratios)[:-1])]
    ours = pyramid_samples(jnp.asarray(latents), jnp.asarray(noise), drawn, level_ranges(SchedulerConfig()), config)
    assert len(ours) == sum(ratios)

    def halved(x):
        return x.unflatten(-2, (-1, 2)).unflatten(-1, (-1, 2)).mean((-3, -1))

    x, z = [channels_first(latents)], [channels_first(noise)]
    for _ in range(2):
        x, z = [halved(x[0]), *x], [2 * halved(z[0]), *z]  # twice the mean of four has variance one again
    scheduler = HeliosScheduler(stages=3, stage_range=[0, 1 / 3, 2 / 3, 1], gamma=1 / 3)
    number = 0
    for i, ratio in enumerate(ratios):
        first, last = scheduler.start_sigmas[i], scheduler.end_sigmas[i]
        below = x[i - 1].repeat_interleave(2, -1).repeat_interleave(2, -2) if i else 0
        start = first * z[i] + (1 - first) * below if i else z[i]
        end = last * z[i] + (1 - last) * x[i]
        assert i < 2 or torch.equal(end, x[2])
        times = scheduler.timesteps_per_stage[i]
        for _ in range(ratio):
            index = (torch.from_numpy(quantiles[number]) * 1000).long()
            sigma, timestep = scheduler.sigmas_per_stage[i][index].float(), times[index]
            if shift is not None:
                sigma = shifted(sigma, math.prod(x[i].shape[2:]) // 4, shift)
                timestep = times.min() + sigma * (times.max() - times.min())
            sigma = sigma[:, None, None, None, None]
            noisy = sigma * start + (1 - sigma) * end
            samples_agree("stage 2", ours[number], noisy, start - end, sigma, timestep)
            predicted = torch.randn(noisy.shape, generator=torch.Generator().manual_seed(number))
            loss = reference_loss(predicted, start - end, sigma, "cosmap")
            got = flow_loss(jnp.asarray(channels_last(predicted)), ours[number], config)
            check("stage 2, loss", got, loss, 1e-5)
            number += 1


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_times_are_drawn_as_often(weighting):
    config = TimesConfig(weighting=weighting, logit_mean=0.4, logit_std=0.8)
    keys = jax.random.split(jax.random.key(0), 20000)
    torch.manual_seed(0)
    theirs = compute_density_for_timestep_sampling(weighting, 20000, 0.4, 0.8, 1.29).numpy()
    at = np.linspace(0.02, 0.98, 25)
    np.testing.assert_allclose(np.quantile(draw_quantile(keys, config), at), np.quantile(theirs, at), atol=0.02)


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (24, 40)])
def test_blur_is_antialiased_bilinear_resizing(size):
    ratios = np.linspace(0.4, 1.0, 13, dtype=np.float32)
    frames = np.random.default_rng(0).standard_normal((len(ratios), *size, 3), np.float32)
    expected = []
    for frame, ratio in zip(frames, ratios):
        small = [max(1, round(n * float(ratio))) for n in size]
        x = torch.from_numpy(frame).permute(2, 0, 1)[None]
        for to in (small, size):
            x = F.interpolate(x, size=tuple(to), mode="bilinear", align_corners=False, antialias=True)
        expected.append(x[0].permute(1, 2, 0).numpy())
    check("history blur", blur(jnp.asarray(frames), jnp.asarray(ratios)), np.stack(expected), 1e-5)


def test_saturation_scales_about_the_mean_of_the_channels():
    rng = np.random.default_rng(0)
    frames, factor = rng.standard_normal((4, 3, 3, 5), np.float32), rng.uniform(0.3, 1.7, 4).astype(np.float32)
    gray = frames.mean(-1, keepdims=True)
    expected = gray + factor[:, None, None, None] * (frames - gray)
    check("history saturation", saturate(jnp.asarray(frames), jnp.asarray(factor)), expected, 1e-5)
