"""The hierarchical memory: the past that a chunk is conditioned on, of a fixed shape however long the video grows."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from helios_jax.models.transformer import FrameIndices, HistoryLatents
from helios_jax.models.transformer.history import num_tokens


@dataclass(unsafe_hash=True)
class MemoryConfig:
    """The history window in latent frames (paper section 3.2), from far to near.

    `anchor="first"` keeps the video's first latent frame in the window for ever, None keeps none. "second" begins like
    "first"; then the first frame of the second generated chunk replaces the anchor, even that of an input image or
    video (diffusers' `is_skip_first_chunk`). Positions are "relative" (frame indices never grow; the released models)
    or "absolute" (they count from the video's start, that of an input video included). Rotary embeddings see distances
    only, so the two differ by the distance to the anchor alone: without one they are the same.
    """

    long: int = 16
    mid: int = 2
    recent: int = 1
    anchor: Literal["first", "second"] | None = "first"
    frames_per_chunk: int = 9
    positions: Literal["relative", "absolute"] = "relative"

    def __post_init__(self) -> None:
        if min(self.long, self.mid) < 0 or self.recent < 1 or self.frames_per_chunk < 1:
            raise ValueError(
                f"history sizes (long {self.long}, mid {self.mid}, recent {self.recent}) must not be negative,"
                f" recent and frames_per_chunk ({self.frames_per_chunk}) must be at least 1"
            )

    @property
    def frames(self) -> int:
        """Latent frames in the window, without the anchor."""
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, int]:
        """Latent frames of each part of the window, from far to near, without the anchor, which joins the short one."""
        return {"long": self.long, "mid": self.mid, "short": self.recent}

    def num_tokens(self, height: int, width: int, patch: tuple[int, ...]) -> int:
        """Tokens that the transformer makes of the window; sizes are the latents'."""
        parts = self.parts | {"short": self.recent + bool(self.anchor)}
        return num_tokens(parts, height, width, patch)


@struct.dataclass
class History:
    """The past of a video: the last frames (`latents`) [b, frames, h, w, c], zeros where the video has not begun; the
    `anchor` [b, 1, h, w, c], which is known if `anchored`; and the number of chunks made (`chunk`), one number or one
    per sample, after those `before` them, of an input video."""

    latents: Any
    anchor: Any
    anchored: Any
    chunk: Any
    before: Any = 0


def empty(config: MemoryConfig, batch: int, height: int, width: int, channels: int) -> History:
    """The history of a video without a past, as in text to video: zeros. Sizes are the latents'."""
    return History(
        latents=jnp.zeros((batch, config.frames, height, width, channels), jnp.float32),
        anchor=jnp.zeros((batch, 1, height, width, channels), jnp.float32),
        anchored=jnp.asarray(False),
        chunk=jnp.asarray(0, jnp.int32),
        before=jnp.asarray(0, jnp.int32),
    )


def push(history: History, latents: Float[Array, "b t h w c"], config: MemoryConfig) -> History:
    """The history after a chunk. The first chunk's first frame becomes the anchor unless one is known.

    With `config.anchor="second"`, the second generated chunk's first frame then replaces it in any case.
    """
    frames = history.latents.shape[1]
    keep = history.anchored
    if config.anchor == "second":
        keep = keep & (jnp.reshape(history.chunk, (-1, 1, 1, 1, 1)) != 1)
    return replace(
        history,
        latents=jnp.concatenate([history.latents, latents], 1)[:, -frames:],
        anchor=jnp.where(keep, history.anchor, latents[:, :1]),
        anchored=jnp.asarray(True),
        chunk=history.chunk + 1,
    )


def window(config: MemoryConfig, history: History) -> tuple[HistoryLatents, FrameIndices]:
    """The transformer's view of `history`, and the frame indices of it and of the chunk to come.

    Relative positions are anchor 0, then long, mid, recent and noisy frames in a row (diffusers' HeliosPipeline).
    """
    first = 1 if config.anchor else 0
    made = jnp.reshape(history.before + history.chunk, (-1, 1))
    start = made * config.frames_per_chunk if config.positions == "absolute" else 0
    row = first + start + jnp.arange(config.frames + config.frames_per_chunk)[None]

    latents, indices, begin = {}, {}, 0
    for part, frames in config.parts.items():
        if frames:
            latents[part], indices[part] = (x[:, begin : begin + frames] for x in (history.latents, row))
        begin += frames
    if config.anchor:
        latents["short"] = jnp.concatenate([history.anchor, latents["short"]], 1)
        indices["short"] = jnp.concatenate([jnp.zeros_like(row[:, :1]), indices["short"]], 1)
    return HistoryLatents(**latents), FrameIndices(noisy=row[:, begin:], **indices)
