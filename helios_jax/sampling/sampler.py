"""The autoregressive loop over chunks, in one program (`generate`) or chunk by chunk (`stream`)."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from operator import itemgetter
from typing import TypeVar

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float
from numpy.typing import ArrayLike

from helios_jax.diffusion import solvers
from helios_jax.diffusion.denoise import Conditioning, denoise_chunk, denoise_step
from helios_jax.diffusion.memory import History, MemoryConfig, push
from helios_jax.diffusion.solvers import Steps
from helios_jax.models.transformer import Transformer

Progress = Callable[[int, int], None]
Chunk = TypeVar("Chunk")


@partial(jax.jit, static_argnames="memory")
def generate(
    model: Transformer,
    history: History,
    noise: Float[Array, "chunks b t h w c"],
    conditioning: Conditioning,
    steps: Steps,
    *,
    memory: MemoryConfig,
) -> tuple[History, Float[Array, "b t_all h w c"]]:
    """All chunks as one `lax.scan`: the latents without the history they began with, and the history after them."""

    def body(history, noise):
        latents = denoise_chunk(model, history, noise, conditioning, steps, memory)
        return push(history, latents), latents

    history, chunks = jax.lax.scan(body, history, noise)
    return history, rearrange(chunks, "k b t h w c -> b (k t) h w c")


_step = jax.jit(denoise_step, static_argnames="memory")
_push = jax.jit(push)


def stream(
    model: Transformer,
    history: History,
    noise: Iterable[ArrayLike],
    conditioning: Conditioning,
    steps: Steps,
    *,
    memory: MemoryConfig,
    finish: Callable[[Array], Chunk],
    progress: Progress | None = None,
) -> Iterator[Chunk]:
    """Yields `finish(latents)` of each chunk; the noise decides how many there are.

    A chunk is yielded once the next one has begun, so that the device works while the host handles frames.
    `progress(chunk, step)` is called when a step has been computed.
    """
    rows = [jax.tree.map(itemgetter(i), steps) for i in range(len(steps.sigma))]
    done: list[Chunk] = []
    for chunk, sample in enumerate(noise):
        state = solvers.start(jnp.asarray(sample), steps)
        for i, row in enumerate(rows):
            state = _step(model, state, row, history, conditioning, memory=memory)
            yield from done
            done = []
            if progress is not None:
                jax.block_until_ready(state.sample)
                progress(chunk, i)
        history = _push(history, state.sample)
        done = [finish(state.sample)]
    yield from done
