"""One chunk from noise to latents: the only loop over levels and steps.

`through_levels` is the loop. It runs in four ways: all steps of a level in one scan (`denoise_chunk`), step by step for
streams (`sampling.sampler`), recorded for a teacher's trajectories (`record_chunk`), and with a random end and one
gradient step in each level for the student of stage 3 (`denoise_to_exits`).
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from helios_jax.diffusion import solvers
from helios_jax.diffusion.guidance import guide
from helios_jax.diffusion.memory import History, MemoryConfig, window
from helios_jax.diffusion.pyramid import block_noise, downsample, upsample
from helios_jax.diffusion.solvers import SolverState, Steps
from helios_jax.models.transformer import Transformer
from helios_jax.models.transformer.remat import Remat


@struct.dataclass
class Conditioning:
    """The text's keys and values (`Transformer.text_kv`) and the guidance.

    With a guidance scale, the text's batch holds the prompts, then as many negative prompts. None means no guidance and
    a batch of half the size. `zero_star` turns CFG-Zero*'s projection on.
    """

    text: Any
    guidance_scale: Any = None
    zero_star: bool = struct.field(pytree_node=False, default=False)


@struct.dataclass
class Level:
    """One resolution of the pyramid; a model without a pyramid has one level.

    `moves` [steps] is 0 where a step takes a velocity of zero (CFG-Zero*'s zero init), None if no step does. All levels
    but the first begin with alpha * upsampled latents + beta * block noise: `alpha`, `beta` and the `gamma` of that
    noise. `begin` and `end` are the sigmas that the level begins and ends with on the path from noise (1) to data (0);
    `Steps.sigma` counts within the level.
    """

    steps: Steps
    moves: Any = None
    begin: Any = None
    end: Any = None
    alpha: Any = None
    beta: Any = None
    gamma: float | None = struct.field(pytree_node=False, default=None)


@struct.dataclass
class Held:
    """A known first latent frame of a chunk, for the steps of one level.

    `frame` [b, 1, h, w, c] has the level's size. `below` is the frame of the next coarser level, upsampled to this size
    (zeros at the coarsest). `begin` and `end` are the sigmas of `Level`.
    """

    frame: Any
    below: Any
    begin: Any
    end: Any


@struct.dataclass
class ChunkNoise:
    """Standard normal noise of one chunk: at full size, and at the size of every level but the first."""

    latents: Any
    blocks: tuple[Any, ...] = ()


@jax.jit
def first_sample(noise: ChunkNoise, levels: Sequence[Level]) -> Float[Array, "b t h w c"]:
    """The first level's starting sample: the noise at that level's size, with its variance kept."""
    sample = noise.latents
    for _ in levels[1:]:
        sample = 2 * downsample(sample)
    return sample


@jax.jit
def enter(level: Level, sample: Float[Array, "b t h w c"], white: Float[Array, "b t h2 w2 c"]):
    """A later level's starting sample, from the result of the level before and white noise at this level's size."""
    assert level.gamma is not None
    return level.alpha * upsample(sample) + level.beta * block_noise(white, level.gamma)


@jax.jit
def hold(frame: Float[Array, "b 1 h w c"], levels: Sequence[Level]) -> list[Held]:
    """Makes `Held` for each level from the chunk's first latent frame at full size."""
    sizes = [frame]
    for _ in levels[1:]:
        sizes.append(downsample(sizes[-1]))
    sizes.reverse()
    below = [jnp.zeros_like(sizes[0]), *map(upsample, sizes[:-1])]
    return [Held(frame, under, level.begin, level.end) for frame, under, level in zip(sizes, below, levels)]


def held_velocity(
    velocity: Float[Array, "b t h w c"], sample: Float[Array, "b t h w c"], sigma: Any, held: Held
) -> Float[Array, "b t h w c"]:
    """`velocity` with a first frame that leads from `sample`, at the level's `sigma`, to the known frame.

    A level's path goes from (1 - begin) * below + begin * noise to (1 - end) * frame + end * noise. The noise follows
    from the sample.
    """
    data = (1 - sigma) * (1 - held.end) * held.frame + sigma * (1 - held.begin) * held.below
    noise = (sample[:, :1] - data) / ((1 - sigma) * held.end + sigma * held.begin)
    first = (1 - held.begin) * held.below + held.begin * noise
    last = (1 - held.end) * held.frame + held.end * noise
    return jnp.concatenate([first - last, velocity[:, 1:]], 1)


# Jitted, so that it copies its input: the noise belongs to the caller, and some solvers keep the level's first sample.
start = jax.jit(solvers.start)


def guided_velocity(
    model: Transformer,
    sample: Float[Array, "b t h w c"],
    timestep: Float[Array, "*b"],
    history: History,
    conditioning: Conditioning,
    memory: MemoryConfig,
    *,
    dtype: Any = None,
    remat: Remat | None = None,
) -> Float[Array, "b t h w c"]:
    """The model's velocity, moved away from the negative prompt's by classifier-free guidance; float32.

    `timestep` is one for all samples, or one for each. The model computes in `dtype`, by default its weights'.
    """
    dtype = model.dtype if dtype is None else dtype
    parts, indices = window(memory, history)
    guided = conditioning.guidance_scale is not None

    def batch(x):
        return jnp.concatenate([x, x]) if guided else x

    x = batch(sample).astype(dtype)
    velocity = model(
        x,
        batch(jnp.broadcast_to(timestep, sample.shape[:1])),
        conditioning.text,
        jax.tree.map(lambda part: batch(part).astype(dtype), parts),
        indices,
        remat=remat,
    ).astype(jnp.float32)
    if not guided:
        return velocity
    positive, negative = jnp.split(velocity, 2)
    return guide(positive, negative, conditioning.guidance_scale, project=conditioning.zero_star)


def denoise_step(
    model: Transformer,
    state: SolverState,
    level: Level,
    history: History,
    conditioning: Conditioning,
    memory: MemoryConfig,
    *,
    held: Held | None = None,
    dtype: Any = None,
    remat: Remat | None = None,
) -> SolverState:
    """One solver step by the only row in the tables of `level`. With `held`, the first frame moves to the known one."""
    velocity = guided_velocity(
        model, state.sample, level.steps.timestep, history, conditioning, memory, dtype=dtype, remat=remat
    )
    if held is not None:
        velocity = held_velocity(velocity, state.sample, level.steps.sigma, held)
    if level.moves is not None:
        velocity = velocity * level.moves
    return solvers.advance(state, velocity, level.steps)


def rows(level: Level) -> Level:
    """The part of a level that differs from step to step, its tables, for a scan over the steps."""
    return Level(level.steps, level.moves)


# Solves one level: takes its number, the level and the state at its start; yields the state after each advance.
Solve = Callable[[int, Level, SolverState], Iterator[SolverState]]


def through_levels(noise: ChunkNoise, levels: Sequence[Level], solve: Solve) -> Iterator[SolverState]:
    """Runs `solve` on each level, coarsest first, beginning with noise. Yields every state; the last is the result."""
    sample = first_sample(noise, levels)
    for i, level in enumerate(levels):
        if i > 0:
            sample = enter(level, sample, noise.blocks[i - 1])
        for state in solve(i, level, start(sample, level.steps)):
            yield state
            sample = state.sample


def denoise_chunk(
    model: Transformer,
    history: History,
    noise: ChunkNoise,
    conditioning: Conditioning,
    levels: Sequence[Level],
    memory: MemoryConfig,
    held: Sequence[Held] | None = None,
) -> Float[Array, "b t h w c"]:
    """The latents of the next chunk, each level in one scan over its steps; `hold` makes `held`."""
    return record_chunk(model, history, noise, conditioning, levels, memory, held=held)[0]


def record_chunk(
    model: Transformer,
    history: History,
    noise: ChunkNoise,
    conditioning: Conditioning,
    levels: Sequence[Level],
    memory: MemoryConfig,
    places: Sequence[Sequence[int]] | None = None,
    held: Sequence[Held] | None = None,
) -> tuple[Float[Array, "b t h w c"], list[Float[Array, "steps b t _h _w c"]]]:
    """`denoise_chunk` that also returns, for each level, the samples before its steps `places`, then its result.

    Without `places` nothing is recorded. `held`, one for each level, is the chunk's first frame, if it is known.
    """
    recorded = []

    def solve(i: int, level: Level, state: SolverState) -> Iterator[SolverState]:
        def step(state: SolverState, row: Level) -> tuple[SolverState, Any]:
            after = denoise_step(
                model, state, row, history, conditioning, memory, held=None if held is None else held[i]
            )
            return after, None if places is None else state.sample

        after, began = jax.lax.scan(step, state, rows(level))
        if places is not None:
            recorded.append(jnp.concatenate([began[jnp.array(places[i], int)], after.sample[None]]))
        yield after

    *_, last = through_levels(noise, levels, solve)
    return last.sample, recorded


def denoise_to_exits(
    model: Transformer,
    history: History,
    noise: ChunkNoise,
    conditioning: Conditioning,
    levels: Sequence[Level],
    memory: MemoryConfig,
    exits: Sequence[Int[Array, " b"]],
    *,
    with_gradient: bool = True,
    dtype: Any = None,
    remat: Remat | None = None,
) -> Float[Array, "b t h w c"]:
    """A chunk whose levels end early, as the student makes it in stage 3 (inference_with_trajectory_stage2).

    Sample b ends level i with the step `exits[i][b]`; `exits.end_at` makes the tables of `levels`. The gradient
    goes through each level's last step, and from there into the level below where that step is also the first.
    `with_gradient=False` makes the same chunk by a program half as large, where no gradient is needed.
    """
    fixed_model, fixed_conditioning = jax.lax.stop_gradient((model, conditioning))

    def solve(i: int, level: Level, state: SolverState) -> Iterator[SolverState]:
        table, last = rows(level), exits[i]
        count = last if with_gradient else last + 1

        def step(k: Array, state: SolverState) -> SolverState:
            row = jax.tree.map(lambda x: x[k], table)
            after = denoise_step(fixed_model, state, row, history, fixed_conditioning, memory, dtype=dtype)
            return dataclasses.replace(after, sample=jnp.where(_aligned(k < count), after.sample, state.sample))

        before = jax.lax.stop_gradient(state)
        if not with_gradient or len(table.steps.sigma) > 1:
            before = jax.lax.fori_loop(0, count.max(), step, before)
        if not with_gradient:
            yield before
            return
        # Where the first step is the last one, the level below gets a gradient through it.
        before = dataclasses.replace(before, sample=jnp.where(_aligned(last == 0), state.sample, before.sample))
        row = jax.tree.map(lambda x: x[last, jnp.arange(len(last))], table)
        yield denoise_step(model, before, row, history, conditioning, memory, dtype=dtype, remat=remat)

    *_, state = through_levels(noise, levels, solve)
    return state.sample


def _aligned(x: Array) -> Array:
    return x[:, None, None, None, None]
