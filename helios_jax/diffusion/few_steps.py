"""The student of stage 3: a chunk in few steps, of which one a level is taken with a gradient (paper section 3.5).

Each level begins with noise (or the level below, upsampled and noised); a step predicts the level's result, and all but
the last noise it again with what the level began with: the DMD solver of `diffusion.solvers`. In training a level ends
at a step drawn at random, so that every step learns; the gradient goes through that step only, and from there into the
levels below as far as nothing stopped it (upstream's inference_with_trajectory_stage2).
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from helios_jax.diffusion.denoise import ChunkNoise, enter, first_sample
from helios_jax.diffusion.levels import StudentLevel
from helios_jax.diffusion.memory import History
from helios_jax.diffusion.noising import add_noise, predict_data

# (level's sample [b, t, h, w, c], timestep [b], whether gradients are wanted) -> velocity
Velocity = Callable[[Array, Array, bool], Array]


def is_first_chunk(history: History) -> Bool[Array, " b"]:
    """True for samples that have no past at all."""
    return ~(history.latents.any((1, 2, 3, 4)) | history.anchor.any((1, 2, 3, 4)))


def draw_exits(key: Key[Array, ""], levels: Sequence[StudentLevel], first: Bool[Array, " b"]) -> list[Int[Array, " b"]]:
    """At which step each level ends: one draw for all samples, and one for those that are a first chunk.

    (One for all, since a batch takes as many passes as its longest sample.)
    """
    exits = []
    for i, level in enumerate(levels):
        u = jax.random.uniform(jax.random.fold_in(key, i), (2,))
        exits.append(jnp.floor(u * level.count).astype(jnp.int32)[first.astype(jnp.int32)])
    return exits


def last_exits(levels: Sequence[StudentLevel], first: Bool[Array, " b"]) -> list[Int[Array, " b"]]:
    """Every level to its end: what the sampler does."""
    return [(level.count - 1)[first.astype(jnp.int32)] for level in levels]


def generate(
    velocity: Velocity,
    noise: ChunkNoise,
    levels: Sequence[StudentLevel],
    exits: Sequence[Int[Array, " b"]],
    first: Bool[Array, " b"],
    *,
    with_gradient: bool = True,
) -> Float[Array, "b t h w c"]:
    """The student's chunk, each level ended at its step of `exits`; `first` chooses each sample's row of the tables.

    `with_gradient` false is for a chunk that nothing is learnt from: the same chunk, as half as large a program.
    """

    row = first.astype(jnp.int32)
    sample = first_sample(noise, [level.entry for level in levels])
    for i, (level, stop) in enumerate(zip(levels, exits, strict=True)):
        if i > 0:
            sample = enter(level.entry, sample, noise.blocks[i - 1])
        timestep, sigma = level.timestep[row], level.sigma[row]
        origin = jax.lax.stop_gradient(sample)
        count = stop if with_gradient else stop + 1
        step = partial(_step, velocity, timestep, sigma, origin, stop, count)
        before = origin
        if not with_gradient or timestep.shape[1] > 1:
            before = jax.lax.fori_loop(0, count.max(), step, origin)
        if not with_gradient:
            sample = before
            continue
        # Where the first step is the last, what is below gets a gradient through it.
        before = jnp.where(_at(stop == 0), sample, jax.lax.stop_gradient(before))
        (t,), (s,) = (jnp.take_along_axis(x, stop[:, None], 1).T for x in (timestep, sigma))
        sample = predict_data(before, velocity(before, t, True), s)
    return sample


def _step(
    velocity: Velocity,
    timestep: Array,
    sigma: Array,
    origin: Array,
    stop: Array,
    count: Array,
    k: Array,
    sample: Array,
) -> Array:
    """Step k of a level, for those samples that take more than k; at `stop` it ends with what the step predicts."""
    x0 = predict_data(sample, velocity(sample, timestep[:, k], False), sigma[:, k])
    after = jnp.where(k < stop, sigma[:, k + 1], 0)
    return jnp.where(_at(k < count), add_noise(x0, origin, after), sample)


def _at(x: Array) -> Array:
    return x[:, None, None, None, None]
