"""Streams: videos made chunk by chunk, without end if asked for, with prompts that change."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from helios_jax.diffusion.denoise import ChunkNoise, Conditioning, Level
from helios_jax.diffusion.memory import History
from helios_jax.models.transformer import Transformer
from helios_jax.models.vae import AutoencoderKLWan
from helios_jax.sampling import sampler
from helios_jax.sampling.frames import decode, encode_last_frame
from helios_jax.sampling.noise import Noise, SeededNoise, draw
from helios_jax.sampling.plan import Plan
from helios_jax.sampling.prompts import Entry, Schedule
from helios_jax.sampling.stream_state import Snapshot
from helios_jax.sampling.text import Texts


@dataclass(frozen=True)
class Call:
    """Inputs of every chunk of a call, made from its arguments.

    `first` chunks have been made already, and `history` is the history after them. `identity` tells the checkpoint.
    Where chunks overlap, `overlap` is the VAE, and `begins` the latent frame of the image or video that the first chunk
    begins with.
    """

    plan: Plan
    prompts: Schedule
    texts: Texts
    noise: Noise
    history: History
    identity: dict[str, Any]
    first: int = 0
    overlap: AutoencoderKLWan | None = None
    begins: Any = None

    @property
    def batch(self) -> int:
        return len(self.prompts.entries[0].prompts)

    def chunk_noise(self) -> ChunkNoise:
        """The next chunk's noise."""

        def normal(site: str, shape: tuple[int, ...]):
            shape = (self.batch, *shape)
            return jnp.asarray(draw(self.noise.normal(site, shape), shape, site))

        latents = normal("latents", self.plan.latent_shape)
        return ChunkNoise(latents, tuple(normal("block_noise", shape) for shape in self.plan.block_shapes()))

    def levels(self, chunk: int) -> tuple[Level, ...]:
        return self.plan.levels if chunk else self.plan.first_levels

    def conditioning(self, text: Any) -> Conditioning:
        scale = self.plan.guidance_scale
        return Conditioning(text, None if scale is None else jnp.float32(scale), self.plan.zero_star)


class Stream:
    """An iterator over chunks, numpy arrays of `finish(latents)`, from `HeliosPipeline.stream` or `resume`.

    The next chunk is queued before a chunk is yielded, so that a slow caller does not stall the device. A chunk that
    has begun keeps its text.
    """

    def __init__(
        self,
        transformer: Transformer,
        call: Call,
        finish: Callable[[Any], Any],
        progress: sampler.Progress | None = None,
        *,
        pixels: bool = True,
    ):
        self.call = call
        self.plan = call.plan
        self.chunk = call.first  # chunks yielded, over the whole video
        self.latents: np.ndarray | None = None  # [b, t, h, w, c] of the chunk that was yielded last
        self.about: dict[str, Any] | None = None  # JSON that saved states keep: the settings and inputs of the video
        self.pixels = pixels  # True if `finish` returns pixels, False for latents
        self._finish = finish
        self._prompts = call.prompts
        self._begun = call.first  # chunks whose text and noise are fixed
        self._history = call.history
        self._asked = {call.first: _asked(call.noise)}  # the numbers of draws made before each chunk
        self._chunks = sampler.stream(
            transformer,
            call.history,
            self._inputs(),
            memory=call.plan.memory,
            finish=lambda latents: _to_host((latents, finish(latents))),
            progress=None if progress is None else lambda chunk, step: progress(chunk + call.first, step),
            begins=self._first_frame(),
            overlap=None if call.overlap is None else self._next_frame,
        )

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        """The next chunk. The last one is cut to `num_frames`. Raises FloatingPointError (`check_latents`)."""
        (latents, out), self._history = next(self._chunks)
        out, self.latents = np.asarray(out), np.asarray(latents)
        check_latents(self.latents, self.chunk)
        del self._asked[self.chunk]
        begin, end = self.plan.frames.before(self.chunk), self.plan.options.num_frames
        out = self._added(out, self.chunk)
        self.chunk += 1
        self._prompts = self._prompts.prune(self.chunk)
        self.call.texts.forget([entry.prompts for entry in self._prompts.entries])
        return out[:, : end - begin] if self.pixels and end is not None else out

    def _first_frame(self) -> jax.Array | None:
        """The latent frame that the first chunk of this stream begins with, where one is known."""
        if self.call.overlap is None or not self.call.first:
            return self.call.begins
        latents = sampler.last_chunk(self.call.history, self.plan.memory)
        return self._next_frame((latents, self._finish(latents)))

    def _next_frame(self, chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
        """The first latent frame of the chunk after `chunk`, a pair: latents, and what `finish` returned for them."""
        vae, (latents, out) = self.call.overlap, chunk
        assert vae is not None
        return encode_last_frame(vae, out if self.pixels else decode(vae, latents, dtype="uint8"))

    def _added(self, out: np.ndarray, chunk: int) -> np.ndarray:
        """A chunk's pixels without the frame that it shares with the chunk before; latents stay as they are."""
        return out[:, -self.plan.frames.of(chunk) :] if self.pixels else out

    def set_prompt(self, prompt: str, crossfade: int | None = None) -> int:
        """Makes all videos of the batch follow `prompt` from the next chunk that has not begun; returns its number.

        The prompt fades in over `crossfade` chunks (by default the call's `interpolation_steps`); 0 changes at once.
        Switches that were planned for later are dropped. Raises ValueError for an empty prompt or a negative crossfade.
        """
        if not prompt.strip():
            raise ValueError("set_prompt needs a prompt, got an empty one")
        crossfade = self.plan.options.interpolation_steps if crossfade is None else crossfade
        if crossfade < 0:
            raise ValueError(f"crossfade must be at least 0 chunks, got {crossfade}")
        entry = Entry(self._begun, (prompt,) * self.call.batch, crossfade if self._begun else 0)
        self.call.texts.encode([entry.prompts])
        self._prompts = self._prompts.switch(entry)
        return entry.chunk

    def last_chunk(self) -> np.ndarray:
        """Makes the last chunk again from the history's latents: the one yielded last, or the one before a saved state.

        Returns all frames that it adds, also those past `num_frames`. Raises ValueError if there is none, or if the
        history is shorter than a chunk.
        """
        frames = self.plan.memory.frames_per_chunk
        if not self.chunk or self.plan.memory.frames < frames:
            raise ValueError(f"the history has {self.plan.memory.frames} latent frames of the last chunk's {frames}")
        return self._added(
            np.asarray(self._finish(sampler.last_chunk(self._history, self.plan.memory))), self.chunk - 1
        )

    def save_state(self, path: str | os.PathLike) -> None:
        """Writes the state after the chunk that was yielded last, a few MB: `HeliosPipeline.resume` continues from it.

        The file is whole or absent, whenever the process ends. Raises ValueError when the call's noise was not seeded.
        """
        self.snapshot().save(path)

    def snapshot(self) -> Snapshot:
        """The state that `save_state` writes, to be written later. Raises ValueError as `save_state` does."""
        asked = self._asked.get(self.chunk)
        noise = self.call.noise
        if asked is None and self._begun == self.chunk:
            asked = _asked(noise)
        if self.chunk == 0 and self.call.begins is not None:
            raise ValueError("the state of a stream whose first chunk has a border is saved after that chunk")
        if not isinstance(noise, SeededNoise) or asked is None:
            raise ValueError("the state of a stream with noise= of its own cannot be saved: use seed= instead")
        meta = {
            "identity": self.call.identity,
            "options": dataclasses.asdict(self.plan.options),
            "prompts": [dataclasses.asdict(entry) for entry in self._prompts.entries],
            "negatives": self.call.texts.negatives,
            "seeds": noise.seeds,
            "asked": asked,
            "chunk": self.chunk,
            "about": self.about,
        }
        return Snapshot.of(meta, self._history)

    def _inputs(self) -> Iterator[tuple[ChunkNoise, tuple[Level, ...], Conditioning]]:
        """Noise, levels and text of each chunk; the chunk has begun when they are asked for."""
        while self.plan.num_chunks is None or self._begun < self.plan.num_chunks:
            chunk = self._begun
            text = self.call.texts.kv(self._prompts.mixture(chunk))
            noise = self.call.chunk_noise()
            self._begun += 1
            self._asked[self._begun] = _asked(self.call.noise)
            yield noise, self.call.levels(chunk), self.call.conditioning(text)


def check_latents(latents: np.ndarray, first: int = 0) -> None:
    """Raises FloatingPointError for latents [b, t, h, w, c] of chunk `first` that are NaN or infinite."""
    if not np.isfinite(latents).all():
        raise FloatingPointError(
            f"chunk {first}: latents are NaN or infinite; check the weights, the LoRAs and guidance_scale"
        )


def _to_host(arrays: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Asks for a copy of arrays on the host as soon as they are computed; does not wait for it."""
    for array in arrays:
        array.copy_to_host_async()
    return arrays


def _asked(noise: Noise) -> dict[str, int] | None:
    return noise.asked() if isinstance(noise, SeededNoise) else None
