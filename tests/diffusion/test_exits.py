"""The student's chunk: with the last exits it is the sampler's, and its gradient goes through one step a level."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from helios_jax.diffusion.denoise import ChunkNoise, Conditioning, denoise_chunk, denoise_to_exits
from helios_jax.diffusion.exits import draw_exits, end_at, is_first_chunk
from helios_jax.diffusion.levels import make_levels
from helios_jax.diffusion.memory import History, MemoryConfig
from helios_jax.diffusion.schedule import DMDSchedulerConfig, training_shift
from helios_jax.models.transformer import Transformer
from tests.closeness import assert_close
from tests.diffusion.last_exits import last_exits

SHAPE = (2, 3, 8, 16, 4)
STEPS = (2, 1, 3)
FIRST = jnp.array([True, False])


def noise():
    b, t, h, w, c = SHAPE
    rng = np.random.default_rng(0)
    main, *blocks = (jnp.asarray(rng.standard_normal((b, t, h // k, w // k, c), np.float32)) for k in (1, 2, 1))
    return ChunkNoise(main, tuple(blocks))


class Network(Transformer):
    """A velocity of the sample and the time, and of a `bias` that a gradient is taken of."""

    dtype = jnp.float32  # pyright: ignore

    def __init__(self, bias=0.0, linear=False):
        self.bias, self.linear = nnx.Param(jnp.asarray(bias)), linear

    def __call__(self, x, timestep, *_, **__):
        if self.linear:
            return x + self.bias[...]
        return jnp.tanh(0.7 * x) + 0.3 * timestep.reshape(-1, 1, 1, 1, 1) / 1000


def empty():
    return History(jnp.zeros((2, 19, 8, 16, 4)), jnp.zeros((2, 1, 8, 16, 4)), jnp.asarray(False), jnp.asarray(0))


def both_levels(amplify=True, **training):
    """Levels of later chunks, and of a first one."""
    scheduler = DMDSchedulerConfig(use_dynamic_shifting=False)
    counts = STEPS, [n * (1 + amplify) for n in STEPS]
    return tuple(make_levels(scheduler, count, 96, pyramid=True, **training) for count in counts)


def student(network, exits, levels, first=FIRST, with_gradient=True):
    def chunk(exits):
        tables = end_at(exits, *levels, first)
        inputs = empty(), noise(), Conditioning(None), tables, MemoryConfig(), exits
        return denoise_to_exits(network, *inputs, with_gradient=with_gradient)

    return jax.jit(chunk)(exits)


@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize("amplify", [False, True])
def test_to_the_end_it_makes_what_the_sampler_makes(amplify, with_gradient):
    levels = both_levels(amplify)
    ours = student(Network(), last_exits(*levels, FIRST), levels, with_gradient=with_gradient)
    sample = jax.jit(
        lambda level: denoise_chunk(Network(), empty(), noise(), Conditioning(None), level, MemoryConfig())
    )
    for i, first in enumerate(FIRST):
        assert_close(ours[i], sample(levels[int(first)])[i])


def test_in_training_timesteps_are_not_rounded():
    for sampled, trained in zip(both_levels()[0], both_levels(as_trained=True)[0], strict=True):
        np.testing.assert_array_equal(sampled.steps.timestep, np.trunc(trained.steps.timestep))
        np.testing.assert_array_equal(sampled.steps.sigma, trained.steps.sigma)


def test_in_training_an_exponential_shift_is_bounded():
    """The 13824 tokens of 512 x 768 would be shifted by 16.4; the coarsest level's 864 are shifted by 1.83."""
    scheduler = DMDSchedulerConfig(use_dynamic_shifting=True, time_shift_type="exponential")
    for trained, factors in ((True, (1.827, 2.834, 7)), (False, (1.827, 1.827, 2.834))):
        levels = make_levels(scheduler, (2, 2, 2), 13824, pyramid=True, as_trained=trained)
        sigma = (0.999 + 0.000999) / 2
        assert [float(level.steps.sigma[1]) for level in levels] == pytest.approx(
            [s * sigma / (1 + (s - 1) * sigma) for s in factors], rel=1e-3
        )
    assert training_shift((1, 9, 64, 96, 16), "exponential") == 7


def test_without_a_gradient_it_is_the_same_chunk():
    exits = [jnp.array([3, 0]), jnp.array([0, 0]), jnp.array([1, 2])]
    one, other = (student(Network(), exits, both_levels(), with_gradient=wanted) for wanted in (True, False))
    assert_close(one, other)


def slope(exits, first=False):
    """How a constant that is added to every velocity moves the chunk, for one gradient's way through `exits`."""
    first, stops = jnp.full((2,), first), [jnp.full((2,), n) for n in exits]

    def chunk(bias):
        made = student(Network(bias, linear=True), stops, both_levels(), first)
        return made[:, 0, 0, 0, 0].mean()  # every number moves alike; a sum of thousands would round

    return float(jax.grad(chunk)(0.0))


def test_the_gradient_goes_through_the_step_a_level_ends_at():
    levels, _ = both_levels()
    sigma = [np.asarray(level.steps.sigma) for level in levels]
    assert slope((1, 0, 2)) == pytest.approx(-sigma[2][2], rel=1e-5)
    # A level that ends at its first step hands the gradient on to what it was entered from.
    below = slope((1, 0, 0)) + sigma[2][0]  # of float32 sums, as both are
    alpha, entered = float(levels[2].alpha), float(levels[1].alpha)
    expected = (1 - sigma[2][0]) * alpha * (-sigma[1][0] + (1 - sigma[1][0]) * entered * -sigma[0][1])
    assert below == pytest.approx(expected, abs=1e-6)


def test_exits_are_drawn_from_all_steps_alike_and_twice_as_many_in_a_first_chunk():
    drawn = jax.vmap(lambda key: jnp.stack(draw_exits(key, *both_levels(), FIRST)))(
        jax.random.split(jax.random.key(0), 600)
    )
    for i, count in enumerate(STEPS):
        for sample, most in ((0, 2 * count), (1, count)):
            share = np.bincount(np.asarray(drawn[:, i, sample]), minlength=most) / 600
            np.testing.assert_allclose(share, np.full(most, 1 / most), atol=0.07)


def test_a_first_chunk_is_one_without_any_past():
    latents, anchor = np.zeros((3, 19, 2, 2, 4), np.float32), np.zeros((3, 1, 2, 2, 4), np.float32)
    latents[1, -1, 0, 0, 0] = anchor[2, 0, 0, 0, 0] = 1.0
    history = History(jnp.asarray(latents), jnp.asarray(anchor), jnp.asarray(True), jnp.zeros(3))
    assert is_first_chunk(history).tolist() == [True, False, False]
