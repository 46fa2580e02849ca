"""One chunk from noise to latents. The sampler and few-step training share these functions."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from helios_jax.diffusion import solvers
from helios_jax.diffusion.guidance import guide
from helios_jax.diffusion.memory import History, MemoryConfig, window
from helios_jax.diffusion.pyramid import block_noise, downsample, upsample
from helios_jax.diffusion.solvers import SolverState, Steps
from helios_jax.models.transformer import Transformer


@struct.dataclass
class Conditioning:
    """The text's keys and values (`Transformer.text_kv`) and the guidance.

    With a guidance scale the text's batch is the prompts, then as many negative prompts; without one (None) there is
    no guidance and no second pass. `zero_star` is CFG-Zero*'s projection.
    """

    text: Any
    guidance_scale: Any = None
    zero_star: bool = struct.field(pytree_node=False, default=False)


@struct.dataclass
class Level:
    """One resolution of the pyramid; a model without a pyramid has one level.

    `moves` [steps] is 0 where a step keeps the sample as it is (CFG-Zero*'s zero init), None when there is no such
    step. All levels but the first begin with alpha * upsampled latents + beta * block noise: `alpha`, `beta` and the
    `gamma` of that noise.
    """

    steps: Steps
    moves: Any = None
    alpha: Any = None
    beta: Any = None
    gamma: float | None = struct.field(pytree_node=False, default=None)


@struct.dataclass
class ChunkNoise:
    """Standard normal noise of one chunk: at full size, and at the size of every level but the first."""

    latents: Any
    blocks: tuple[Any, ...] = ()


def first_sample(noise: ChunkNoise, levels: Sequence[Level]) -> Float[Array, "b t h w c"]:
    """The first level's starting sample: the noise at that level's size, with its variance kept."""
    sample = noise.latents
    for _ in levels[1:]:
        sample = 2 * downsample(sample)
    return sample


def enter(level: Level, sample: Float[Array, "b t h w c"], white: Float[Array, "b t h2 w2 c"]):
    """A later level's starting sample, from the result of the level before."""
    assert level.gamma is not None
    return level.alpha * upsample(sample) + level.beta * block_noise(white, level.gamma)


def guided_velocity(
    model: Transformer,
    sample: Float[Array, "b t h w c"],
    timestep: Float[Array, ""],
    history: History,
    conditioning: Conditioning,
    memory: MemoryConfig,
) -> Float[Array, "b t h w c"]:
    """The model's velocity, moved away from the negative prompt's by classifier-free guidance; float32."""
    parts, indices = window(memory, history)
    guided = conditioning.guidance_scale is not None

    def batch(x):
        return (jnp.concatenate([x, x]) if guided else x).astype(model.dtype)

    x = batch(sample)
    velocity = model(
        x,
        jnp.broadcast_to(timestep, x.shape[:1]),
        conditioning.text,
        jax.tree.map(batch, parts),
        indices,
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
) -> SolverState:
    """One solver step; the tables of `level` hold one row."""
    velocity = guided_velocity(model, state.sample, level.steps.timestep, history, conditioning, memory)
    if level.moves is not None:
        velocity = velocity * level.moves
    return solvers.advance(state, velocity, level.steps)


def rows(level: Level) -> Level:
    """The part of a level that differs from step to step."""
    return Level(level.steps, level.moves)


def denoise_chunk(
    model: Transformer,
    history: History,
    noise: ChunkNoise,
    conditioning: Conditioning,
    levels: Sequence[Level],
    memory: MemoryConfig,
) -> Float[Array, "b t h w c"]:
    """The latents of the next chunk: from noise, through all steps of all levels, coarsest first."""

    def body(state, row):
        return denoise_step(model, state, row, history, conditioning, memory), None

    sample = first_sample(noise, levels)
    for i, level in enumerate(levels):
        if i > 0:
            sample = enter(level, sample, noise.blocks[i - 1])
        state, _ = jax.lax.scan(body, solvers.start(sample, level.steps), rows(level))
        sample = state.sample
    return sample
