"""Stage 3's losses and targets on given draws, against torch: paper equations and tables of diffusers."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.reference
torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from diffusers import HeliosScheduler  # noqa: E402

from helios_jax.diffusion import distillation  # noqa: E402
from helios_jax.diffusion.denoise import ChunkNoise, Conditioning, denoise_to_exits  # noqa: E402
from helios_jax.diffusion.exits import end_at  # noqa: E402
from helios_jax.diffusion.levels import make_levels  # noqa: E402
from helios_jax.diffusion.memory import MemoryConfig, empty  # noqa: E402
from helios_jax.diffusion.noising import add_noise, predict_data  # noqa: E402
from helios_jax.diffusion.pyramid import block_noise  # noqa: E402
from helios_jax.diffusion.schedule import DMDSchedulerConfig  # noqa: E402
from helios_jax.models.discriminator import Head  # noqa: E402
from helios_jax.models.layers import Shapes  # noqa: E402
from helios_jax.models.transformer import Transformer  # noqa: E402
from helios_jax.pretrained import from_arrays  # noqa: E402
from tests.parity.reference import arrays, channels_first, channels_last, check, randomise  # noqa: E402

SHAPE = (2, 3, 16, 24, 4)


def draws(count, shape=SHAPE):
    rng = np.random.default_rng(7)
    return [rng.standard_normal(shape, np.float32) for _ in range(count)]


def velocity(x, timestep):
    """A network of two lines, the same in torch and jax."""
    lib = torch if isinstance(x, torch.Tensor) else jnp
    return 0.9 * lib.tanh(0.7 * x) + 0.3 * timestep.reshape(-1, 1, 1, 1, 1) / 1000


class Network(Transformer):
    dtype = jnp.float32  # pyright: ignore

    def __init__(self):
        pass

    def __call__(self, x, timestep, *_, **__):
        return velocity(x, timestep)


STEPS = (2, 2, 3)


@functools.cache
def student(shift, first):
    """(noise, exits) -> a chunk, compiled once for all exits."""
    b, t, h, w, c = SHAPE
    config = DMDSchedulerConfig(use_dynamic_shifting=shift is not None, time_shift_type=shift or "linear")
    levels, first_levels = (
        make_levels(config, [k * n for n in STEPS], t * h * w // 4, pyramid=True, as_trained=True) for k in (1, 2)
    )
    memory = MemoryConfig()

    def chunk(noise, stops):
        tables = end_at(stops, levels, first_levels, jnp.full((b,), first))
        return denoise_to_exits(Network(), empty(memory, b, h, w, c), noise, Conditioning(None), tables, memory, stops)

    return jax.jit(chunk)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("exits", [(0, 0, 0), (1, 0, 1), (1, 1, 1)])
@pytest.mark.parametrize("shift", ["linear", None])
def test_the_student_s_chunk(first, exits, shift):
    b, t, h, w, c = SHAPE
    (main,) = draws(1)
    whites = [draws(1, (b, t, h // k, w // k, c))[0] for k in (2, 1)]
    exits = [2 * n + 1 if first else n for n in exits]
    noise = ChunkNoise(jnp.asarray(main), tuple(map(jnp.asarray, whites)))
    ours = student(shift, first)(noise, [jnp.full((b,), n) for n in exits])

    scheduler = HeliosScheduler(stages=3, stage_range=[0, 1 / 3, 2 / 3, 1], gamma=1 / 3)
    sample = channels_first(main)
    for _ in range(2):
        sample = 2 * sample.unflatten(-2, (-1, 2)).unflatten(-1, (-1, 2)).mean((-3, -1))
    for i, last in enumerate(exits):
        count = STEPS[i] * (1 + first)
        if i > 0:
            entry = scheduler.ori_start_sigmas[i]
            alpha = 1 / (2 * entry + (1 - entry))  # sqrt(1 + 1/gamma) is 2
            hidden = channels_first(np.asarray(block_noise(jnp.asarray(whites[i - 1]), 1 / 3)))
            up = sample.repeat_interleave(2, -1).repeat_interleave(2, -2)
            sample = alpha * up + alpha * entry * 3**0.5 * hidden
        times = scheduler.timesteps_per_stage[i].double()
        low, high = times.min(), times.max()
        if shift is None:
            scheduler.set_timesteps(count + 1, i)
            sigma, time = scheduler.sigmas[:-2].double(), scheduler.timesteps[:-1].double()
        else:
            mu = 0.5 + 0.65 * (sample[0, 0].numel() // 4 - 256) / 3840
            sigma = torch.linspace(0.999, 0.000999, count + 1, dtype=torch.float64)[:-1]
            sigma = mu * sigma / (1 + (mu - 1) * sigma)
            time = low + sigma * (high - low)
        start = sample
        for k in range(last + 1):
            clean = sample - sigma[k] * velocity(sample, time[k].float().expand(b))
            sample = clean if k == last else (1 - sigma[k + 1]) * clean + sigma[k + 1] * start
    check("stage 3, the student's chunk", ours, channels_last(sample), 1e-5)


def test_ode_regression():
    noisy, predicted, target = draws(3)
    sigma = np.array([0.999, 0.31], np.float32)
    ours = distillation.ode_loss(*map(jnp.asarray, (noisy, predicted, target, sigma)))
    x, v, y = map(torch.from_numpy, (noisy, predicted, target))
    each = [0.5 * F.mse_loss((x[i].double() - float(sigma[i]) * v[i].double()).float(), y[i]) for i in range(2)]
    check("stage 3, ODE regression", ours, torch.stack(each), 1e-5)


def test_distribution_matching():
    made, noise, real, negative, fake = map(torch.from_numpy, draws(5))
    sigma = torch.tensor([0.02, 0.7]).reshape(2, 1, 1, 1, 1)
    noisy = ((1 - sigma) * made + sigma * noise).double()

    def clean(v):
        return noisy - sigma.double() * v.double()

    guided = clean(real) + 3.0 * (clean(real) - clean(negative))
    gradient = (clean(fake) - guided) / (made.double() - guided).abs().mean((1, 2, 3, 4), keepdim=True)
    x = made.double().requires_grad_()
    loss = 0.5 * F.mse_loss(x, (x - gradient).detach())
    loss.backward()

    s = jnp.asarray(sigma.flatten().numpy())
    ours = add_noise(jnp.asarray(made.numpy()), jnp.asarray(noise.numpy()), s)
    check("stage 3, noised again", ours, noisy.float(), 1e-5)

    def ours_clean(v):
        return predict_data(ours, jnp.asarray(v.numpy()), s)

    teacher = ours_clean(real) + 3.0 * (ours_clean(real) - ours_clean(negative))
    ours_gradient = distillation.dmd_gradient(jnp.asarray(made.numpy()), teacher, ours_clean(fake))
    check("stage 3, DMD gradient", ours_gradient, gradient.float(), 1e-5)
    value, got = jax.value_and_grad(lambda m: distillation.dmd_loss(m, ours_gradient).mean())(jnp.asarray(made.numpy()))
    check("stage 3, DMD loss", value, loss.float(), 1e-5)
    assert x.grad is not None
    check("stage 3, what the student gets", got, x.grad.float(), 1e-5)


def test_discriminator_losses():
    rng = np.random.default_rng(3)
    fake, real, moved = (rng.standard_normal((4, 5)).astype(np.float32) for _ in range(3))
    t = {name: torch.from_numpy(x) for name, x in (("fake", fake), ("real", real), ("moved", moved))}
    for logits, is_real, sign in ((fake, False, -1), (real, True, 1)):
        ours = distillation.gan_loss(jnp.asarray(logits), is_real).mean()
        check("stage 3, GAN losses", ours, F.softplus(sign * torch.from_numpy(logits)).mean(), 1e-5)
    for per_sigma, scale in ((False, 1.0), (True, 0.1)):
        config = distillation.PenaltyConfig(weight=100.0, sigma=0.1, per_sigma=per_sigma)
        ours = distillation.penalty(jnp.asarray(real), jnp.asarray(moved), config).mean()
        check("stage 3, R1", ours, 100 * (((t["moved"] - t["real"]) / scale) ** 2).mean(), 1e-5)


@pytest.fixture(scope="module", params=["uniform", "beta"])
def drawn(request):
    """The distribution's name, and its compiled draws: (keys, step) -> sigmas."""
    config = distillation.RenoiseConfig(request.param, alpha=4.0, beta=1.5, until=500)
    return request.param, jax.jit(lambda keys, step: distillation.draw_sigma(keys, config, step, 1.9))


@pytest.mark.parametrize("step", [0, 250, 800])
def test_noise_levels_are_drawn_as_often(drawn, step):
    kind, draw = drawn
    got = draw(jax.random.split(jax.random.key(0), 5000), jnp.asarray(step))
    torch.manual_seed(0)
    t = torch.rand(5000)
    if kind == "beta":
        left = 0.5 * (1 + np.cos(np.pi * min(step / 500, 1)))
        t = torch.distributions.Beta(1 + 3.0 * left, 1 + 0.5 * left).sample((5000,))
    expected = (1.9 * t / (1 + 0.9 * t)).clamp(0.02, 0.98).numpy()
    at = np.linspace(0.02, 0.98, 25)
    np.testing.assert_allclose(np.quantile(got, at), np.quantile(expected, at), atol=0.03)


def reference_head(width: int, dim: int):
    """Discriminator3DHead, from its table."""
    layers: list = []
    for i, (kernel, stride, padding) in enumerate(Head.SHAPES):
        conv = torch.nn.Conv3d(dim if i else width, dim, kernel, stride=stride, padding=padding)
        layers += [conv, torch.nn.GroupNorm(32, dim), torch.nn.SiLU()]
    pool = [torch.nn.AdaptiveAvgPool3d(1), torch.nn.Flatten(), torch.nn.Linear(dim, 1)]
    return torch.nn.Sequential(*layers, *pool)


@pytest.mark.parametrize("size", [(9, 8, 10), (4, 4, 4)])
def test_discriminator_head(size):
    ref = randomise(reference_head(5, 64), 0)
    values = {}
    for name, x in arrays(ref).items():
        number, part = name.split(".")
        at = int(number)
        values[f"out.{part}" if at == 20 else f"{'norms' if at % 3 else 'convs'}.{at // 3}.{part}"] = x
    head = from_arrays(Head(5, 64, rngs=Shapes()), values)
    (x,) = draws(1, (2, *size, 5))
    with torch.no_grad():
        check("stage 3, discriminator head", jax.jit(head)(jnp.asarray(x)), ref(channels_first(x))[:, 0], 1e-5)


def test_smallest_is_what_the_head_can_take():
    ref = reference_head(4, 32)
    least = tuple(map(Head.smallest, range(3)))
    assert ref(torch.zeros(2, 4, *least)).shape == (2, 1)
    for axis in range(3):
        size = [n - (i == axis) for i, n in enumerate(least)]
        with pytest.raises(RuntimeError):
            ref(torch.zeros(2, 4, *size))


def test_shapes_are_upstream_s():
    """As in transformer_helios.py: kernels, strides and paddings by name."""
    flat = list(itertools.chain.from_iterable(zip(*Head.SHAPES)))
    assert flat[:6] == [(3, 3, 3), (4, 4, 4), (4, 4, 4), (3, 3, 3), (3, 3, 3), (1, 3, 3)]
    assert flat[6:12] == [(1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 1, 1), (2, 1, 1), (1, 1, 1)]
    assert flat[12:] == [(1, 1, 1)] * 5 + [(0, 1, 1)]
