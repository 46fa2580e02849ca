"""One chunk from noise to latents. The sampler and few-step training share these functions."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from helios_jax.diffusion import solvers
from helios_jax.diffusion.memory import History, MemoryConfig, window
from helios_jax.diffusion.solvers import SolverState, Steps
from helios_jax.models.transformer import Transformer


@struct.dataclass
class Conditioning:
    """The text's keys and values (`Transformer.text_kv`) and the guidance scale.

    With a guidance scale the text's batch is the prompts, then as many negative prompts; without one (None) there is
    no guidance and no second pass.
    """

    text: Any
    guidance_scale: Any = None


def guided_velocity(
    model: Transformer,
    sample: Float[Array, "b t h w c"],
    timestep: Float[Array, ""],
    history: History,
    conditioning: Conditioning,
    memory: MemoryConfig,
) -> Float[Array, "b t h w c"]:
    """The model's velocity, moved away from the negative prompt's by classifier-free guidance; float32."""
    dtype = model.dtype
    parts, indices = window(memory, history)
    guided = conditioning.guidance_scale is not None

    def batch(x):
        return (jnp.concatenate([x, x]) if guided else x).astype(dtype)

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
    return negative + conditioning.guidance_scale * (positive - negative)


def denoise_step(
    model: Transformer,
    state: SolverState,
    step: Steps,
    history: History,
    conditioning: Conditioning,
    memory: MemoryConfig,
) -> SolverState:
    """One solver step; `step` is one row of the tables."""
    velocity = guided_velocity(model, state.sample, step.timestep, history, conditioning, memory)
    return solvers.advance(state, velocity, step)


def denoise_chunk(
    model: Transformer,
    history: History,
    noise: Float[Array, "b t h w c"],
    conditioning: Conditioning,
    steps: Steps,
    memory: MemoryConfig,
) -> Float[Array, "b t h w c"]:
    """The latents of the next chunk, from `noise` (standard normal) through all of `steps`."""

    def body(state, step):
        return denoise_step(model, state, step, history, conditioning, memory), None

    state, _ = jax.lax.scan(body, solvers.start(noise, steps), steps)
    return state.sample
