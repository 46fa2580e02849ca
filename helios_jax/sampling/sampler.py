"""The autoregressive loop over chunks, in one program (`generate`) or chunk by chunk (`stream`)."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import struct
from jaxtyping import Array, Float

from helios_jax.diffusion.denoise import (
    ChunkNoise,
    Conditioning,
    Held,
    Level,
    denoise_chunk,
    denoise_step,
    hold,
    rows,
    through_levels,
)
from helios_jax.diffusion.memory import History, MemoryConfig, push
from helios_jax.diffusion.solvers import SolverState
from helios_jax.models.transformer import Transformer
from helios_jax.models.vae import AutoencoderKLWan
from helios_jax.runtime import interrupts
from helios_jax.runtime.program import program
from helios_jax.sampling.frames import last_frame, to_pixels

Progress = Callable[[int, int], None]
Chunk = TypeVar("Chunk")


@struct.dataclass
class TextChanges:
    """Text that changes from chunk to chunk: `embeddings` [chunks, b, m, d]; `changed` [chunks], True for new ones."""

    embeddings: Any
    changed: Any


@program(static_argnames="memory")
def generate(
    model: Transformer,
    history: History,
    noise: ChunkNoise,
    conditioning: Conditioning,
    texts: TextChanges | None,
    levels: Sequence[Level],
    begins: Float[Array, "b 1 h w c"] | None = None,
    overlap: AutoencoderKLWan | None = None,
    *,
    memory: MemoryConfig,
) -> tuple[History, Float[Array, "b t h w c"]]:
    """Generates chunks in one `lax.scan`; returns the history after them, and their latents without the first history.

    `noise` has the chunks as the first dimension of its arrays. With `texts`, the keys and values of `conditioning` are
    replaced in every chunk whose text is new. With `overlap`, the VAE, a chunk begins with the last frame of the chunk
    before; a single chunk begins with the latent frame `begins`, if given.
    """

    def body(carry, chunk):
        history, kv = carry
        noise, text = chunk
        if text is not None:
            kv = jax.lax.cond(text.changed, lambda: model.text_kv(text.embeddings.astype(model.dtype)), lambda: kv)
        now = conditioning if kv is None else dataclasses.replace(conditioning, text=kv)
        held = None if begins is None else hold(begins, levels)
        if overlap is not None:
            pixels = to_pixels(overlap, last_chunk(history, memory), dtype="uint8")
            held = hold(last_frame(overlap, pixels), levels)
        latents = denoise_chunk(model, history, noise, now, levels, memory, held)
        return (push(history, latents, memory), kv), latents

    # Text that never changes stays out of the carry, which the scan would copy.
    kv = None if texts is None else conditioning.text
    (history, _), chunks = jax.lax.scan(body, (history, kv), (noise, texts))
    return history, rearrange(chunks, "k b t h w c -> b (k t) h w c")


# The most steps of the next chunk that are queued before a chunk is yielded.
AHEAD = 8
# Seconds. A launch that takes longer waits for room in the device's queue. A GPU's holds about a step of the 14B model.
SLOW_LAUNCH = 0.01

# The old state is donated: the new one takes its memory.
step_program = program(static_argnames="memory", donate_argnames="state")(denoise_step)
_push = jax.jit(push, static_argnums=2)


def stream(
    model: Transformer,
    history: History,
    chunks: Iterable[tuple[ChunkNoise, Sequence[Level], Conditioning]],
    *,
    memory: MemoryConfig,
    finish: Callable[[Array], Chunk],
    progress: Progress | None = None,
    begins: Float[Array, "b 1 h w c"] | None = None,
    overlap: Callable[[Chunk], Array] | None = None,
) -> Iterator[tuple[Chunk, History]]:
    """Yields `finish(latents)` of each chunk and the history after it; `chunks` gives noise, levels and text of each.

    A chunk is yielded once the next one is queued, all of it or its first `AHEAD` steps, so that the device works while
    the host handles frames. If launches wait for the device, it is yielded as soon as it is computed and one step is
    queued. `progress(chunk, step)` is called when a step has been computed, steps counted over all levels. Signals are
    handled after every step (`interrupts.check`).

    The first chunk begins with the latent frame `begins`, if given. With `overlap`, each later chunk begins with the
    latent frame that `overlap` returns for the chunk before, as `finish` returned it.
    """
    step = step_program.bind(model)
    ahead = AHEAD if progress is None else 1  # progress waits for every step: a chunk must not wait with it
    known: Sequence[Level] = ()
    tables: list[list[Level]] = []
    done: list[tuple[Chunk, History]] = []
    for chunk, (noise, levels, conditioning) in enumerate(chunks):
        if levels is not known:
            known, tables = levels, [split(level) for level in levels]
        held: Sequence[Held | None] = [None] * len(levels) if begins is None else hold(begins, levels)
        one = partial(step, history=history, conditioning=conditioning, memory=memory)
        sample = noise.latents
        launched = time.monotonic()
        for count, state in enumerate(through_levels(noise, levels, partial(_by_step, one, tables, held)), 1):
            sample = state.sample
            waited = time.monotonic() - launched > SLOW_LAUNCH
            interrupts.check()
            if count == ahead or (waited and _computed(done)):
                yield from _when_computed(done)
                done = []
            if progress is not None:
                jax.block_until_ready(sample)
                progress(chunk, count - 1)
            launched = time.monotonic()
        history = _push(history, sample, memory)
        now = (finish(sample), history)
        begins = None if overlap is None else overlap(now[0])
        yield from _when_computed(done)
        done = [now]
    yield from _when_computed(done)


def last_chunk(history: History, memory: MemoryConfig) -> Float[Array, "b t h w c"]:
    """The latents of the chunk that a history ends with."""
    return history.latents[:, -memory.frames_per_chunk :]


def _by_step(
    step: Callable[..., SolverState],
    tables: Sequence[Sequence[Level]],
    held: Sequence[Held | None],
    i: int,
    level: Level,
    state: SolverState,
) -> Iterator[SolverState]:
    """Takes the steps of a level one by one: a `denoise.Solve`."""
    for row in tables[i]:
        state = step(state, row, held=held[i])
        yield state


def _when_computed(done: list[Chunk]) -> Iterator[Chunk]:
    """Yields `done` as soon as its arrays are computed; signals are handled while it waits."""
    arrays = _arrays(done)
    interrupts.wait(lambda: all(array.is_ready() for array in arrays))
    yield from done


def _computed(done: Any) -> bool:
    return all(array.is_ready() for array in _arrays(done))


def _arrays(tree: Any) -> list[Any]:
    return [array for array in jax.tree.leaves(tree) if isinstance(array, jax.Array)]


def split(level: Level) -> list[Level]:
    """A level for each step, with one row of the tables, cut on the host: on the device every cut is a program."""
    host = jax.tree.map(np.asarray, rows(level))
    return [jax.tree.map(lambda x, i=i: jnp.asarray(x[i]), host) for i in range(len(level.steps.sigma))]
