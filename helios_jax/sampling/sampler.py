"""The autoregressive loop over chunks, in one program (`generate`) or chunk by chunk (`stream`)."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from operator import itemgetter
from typing import TypeVar

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from helios_jax.diffusion import solvers
from helios_jax.diffusion.denoise import (
    ChunkNoise,
    Conditioning,
    Level,
    denoise_chunk,
    denoise_step,
    enter,
    first_sample,
    rows,
)
from helios_jax.diffusion.memory import History, MemoryConfig, push
from helios_jax.models.transformer import Transformer

Progress = Callable[[int, int], None]
Chunk = TypeVar("Chunk")


@partial(jax.jit, static_argnames="memory")
def generate(
    model: Transformer,
    history: History,
    noise: ChunkNoise,
    conditioning: Conditioning,
    levels: Sequence[Level],
    *,
    memory: MemoryConfig,
) -> tuple[History, Float[Array, "b t h w c"]]:
    """Chunks as one `lax.scan`: the latents without the history they began with, and the history after them.

    `noise` has the chunks as the first dimension of its arrays.
    """

    def body(history, noise):
        latents = denoise_chunk(model, history, noise, conditioning, levels, memory)
        return push(history, latents, memory), latents

    history, chunks = jax.lax.scan(body, history, noise)
    return history, rearrange(chunks, "k b t h w c -> b (k t) h w c")


_step = jax.jit(denoise_step, static_argnames="memory")
_enter = jax.jit(enter)
_push = jax.jit(push, static_argnames="config")


def stream(
    model: Transformer,
    history: History,
    chunks: Iterable[tuple[ChunkNoise, Sequence[Level]]],
    conditioning: Conditioning,
    *,
    memory: MemoryConfig,
    finish: Callable[[Array], Chunk],
    progress: Progress | None = None,
) -> Iterator[Chunk]:
    """Yields `finish(latents)` of each chunk; `chunks` gives its noise and its levels, and how many there are.

    A chunk is yielded once the next one has begun, so that the device works while the host handles frames.
    `progress(chunk, step)` is called when a step has been computed, steps counted over all levels.
    """
    done: list[Chunk] = []
    for chunk, (noise, levels) in enumerate(chunks):
        sample = jax.tree.map(jnp.asarray, first_sample(noise, levels))
        count = 0
        for i, level in enumerate(levels):
            if i > 0:
                sample = _enter(level, sample, noise.blocks[i - 1])
            state = solvers.start(sample, level.steps)
            for row in _split(rows(level)):
                state = _step(model, state, row, history, conditioning, memory=memory)
                yield from done
                done = []
                if progress is not None:
                    jax.block_until_ready(state.sample)
                    progress(chunk, count)
                count += 1
            sample = state.sample
        history = _push(history, sample, config=memory)
        done = [finish(sample)]
    yield from done


def _split(level: Level) -> list[Level]:
    return [jax.tree.map(itemgetter(i), level) for i in range(len(level.steps.sigma))]
