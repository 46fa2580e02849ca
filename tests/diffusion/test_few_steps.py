"""The student of few steps: to the end it is the sampler, and its gradient goes through one step a level."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helios_jax.diffusion import few_steps
from helios_jax.diffusion.denoise import ChunkNoise, Conditioning, denoise_chunk
from helios_jax.diffusion.levels import make_levels, student_levels
from helios_jax.diffusion.memory import History, MemoryConfig
from helios_jax.diffusion.schedule import DMDSchedulerConfig, SchedulerConfig
from helios_jax.models.transformer import Transformer
from tests.closeness import assert_close

SHAPE = (2, 3, 8, 16, 4)
STEPS = (2, 1, 3)
FIRST = jnp.array([True, False])


def noise():
    b, t, h, w, c = SHAPE
    rng = np.random.default_rng(0)
    main, *blocks = (jnp.asarray(rng.standard_normal((b, t, h // k, w // k, c), np.float32)) for k in (1, 2, 1))
    return ChunkNoise(main, tuple(blocks))


class Network(Transformer):
    """The velocity of a sample, whatever came before it."""

    dtype = jnp.float32  # pyright: ignore

    def __init__(self):
        pass

    def __call__(self, x, timestep, *_):
        return jnp.tanh(0.7 * x) + 0.3 * timestep.reshape(-1, 1, 1, 1, 1) / 1000


def levels(amplify=True):
    return student_levels(SchedulerConfig(), STEPS, 96, amplify_first_chunk=amplify, shift=None)


@pytest.mark.parametrize("amplify", [False, True])
def test_to_the_end_it_makes_what_the_sampler_makes(amplify):
    scheduler = DMDSchedulerConfig(use_dynamic_shifting=False)
    history = History(jnp.zeros((2, 19, 8, 16, 4)), jnp.zeros((2, 1, 8, 16, 4)), jnp.asarray(False), jnp.asarray(0))
    table, draws = levels(amplify), noise()
    ours = few_steps.generate(lambda x, t, _: Network()(x, t), draws, table, few_steps.last_exits(table, FIRST), FIRST)
    for i, first in enumerate(FIRST):
        counts = [n * (1 + bool(amplify and first)) for n in STEPS]
        plan = make_levels(scheduler, counts, 96, pyramid=True)
        chunk = denoise_chunk(Network(), history, draws, Conditioning(None), plan, MemoryConfig())
        # The sampler's timesteps are whole numbers, as diffusers'; in training they are not.
        np.testing.assert_allclose(ours[i], chunk[i], atol=1e-3)


def test_without_a_gradient_it_is_the_same_chunk():
    table, draws = levels(), noise()
    exits = [jnp.array([3, 0]), jnp.array([0, 0]), jnp.array([1, 2])]

    def velocity(x, t, wanted):
        return Network()(x, t)

    one, other = (
        few_steps.generate(velocity, draws, table, exits, FIRST, with_gradient=wanted) for wanted in (True, False)
    )
    assert_close(one, other)


def slope(exits, first=False):
    """How a constant that is added to every velocity moves the chunk, for one gradient's way through `exits`."""
    first = jnp.full((2,), first)

    def chunk(bias):
        def velocity(x, t, wanted):
            return x + (bias if wanted else jax.lax.stop_gradient(bias))

        made = few_steps.generate(velocity, noise(), levels(), [jnp.full((2,), n) for n in exits], first)
        return made[:, 0, 0, 0, 0].mean()  # every number moves alike; a sum of thousands would round

    return float(jax.grad(chunk)(0.0))


def test_the_gradient_goes_through_the_step_a_level_ends_at():
    sigma = [np.asarray(level.sigma[0]) for level in levels()]
    assert slope((1, 0, 2)) == pytest.approx(-sigma[2][2], rel=1e-5)
    # A level that ends at its first step hands the gradient on to what it was entered from.
    alpha = float(levels()[2].entry.alpha)
    below = slope((1, 0, 0)) + sigma[2][0]  # of float32 sums, as both are
    entered = float(levels()[1].entry.alpha)
    expected = (1 - sigma[2][0]) * alpha * (-sigma[1][0] + (1 - sigma[1][0]) * entered * -sigma[0][1])
    assert below == pytest.approx(expected, abs=1e-6)


def test_exits_are_drawn_from_all_steps_alike_and_twice_as_many_in_a_first_chunk():
    drawn = jax.vmap(lambda key: jnp.stack(few_steps.draw_exits(key, levels(), FIRST)))(
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
    assert few_steps.is_first_chunk(history).tolist() == [True, False, False]
