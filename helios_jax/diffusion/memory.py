"""The hierarchical memory: what a chunk is conditioned on, at a fixed shape however long the video grows."""

from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from helios_jax.models.transformer import FrameIndices, HistoryLatents


@dataclass(unsafe_hash=True)
class MemoryConfig:
    """The history window in latent frames (paper section 3.2), from far to near.

    `anchor="first"` keeps the video's first latent frame in the window for ever, None does not; "second" does, and
    replaces it, even that of an input image or video, by the first frame of the second generated chunk (diffusers'
    `is_skip_first_chunk`). Positions are "relative" (frame indices never grow; the released models) or "absolute"
    (they count from the video's start).
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
        return self.long + self.mid + self.recent


@struct.dataclass
class History:
    """The last latent frames [b, frames, h, w, c], zeros where the video has not begun; the anchor [b, 1, h, w, c];
    whether an anchor is known yet; and the number of chunks made, one number or one per sample."""

    latents: Any
    anchor: Any
    anchored: Any
    chunk: Any


def empty(config: MemoryConfig, batch: int, height: int, width: int, channels: int) -> History:
    """No past: text to video. Sizes are the latents'."""
    return History(
        latents=jnp.zeros((batch, config.frames, height, width, channels), jnp.float32),
        anchor=jnp.zeros((batch, 1, height, width, channels), jnp.float32),
        anchored=jnp.asarray(False),
        chunk=jnp.asarray(0, jnp.int32),
    )


def push(history: History, latents: Float[Array, "b t h w c"], config: MemoryConfig) -> History:
    """The history after a chunk. The first chunk's first frame becomes the anchor unless one is known.

    With `config.anchor="second"` that of the second generated chunk then takes its place, in any case.
    """
    frames = history.latents.shape[1]
    keep = history.anchored
    if config.anchor == "second":
        keep = keep & (jnp.reshape(history.chunk, (-1, 1, 1, 1, 1)) != 1)
    return History(
        latents=jnp.concatenate([history.latents, latents], 1)[:, -frames:],
        anchor=jnp.where(keep, history.anchor, latents[:, :1]),
        anchored=jnp.asarray(True),
        chunk=history.chunk + 1,
    )


def window(config: MemoryConfig, history: History) -> tuple[HistoryLatents, FrameIndices]:
    """The transformer's view of `history`, and the frame indices of it and of the chunk to come.

    Relative positions are anchor 0, then long, mid, recent and noisy frames in a row (diffusers' HeliosPipeline).
    """
    long, mid = config.long, config.long + config.mid
    latents, first = history.latents, 1 if config.anchor else 0
    start = jnp.reshape(history.chunk, (-1, 1)) * config.frames_per_chunk if config.positions == "absolute" else 0
    row = first + start + jnp.arange(config.frames + config.frames_per_chunk)[None]

    short, short_index = latents[:, mid:], row[:, mid : config.frames]
    if config.anchor:
        short = jnp.concatenate([history.anchor, short], 1)
        short_index = jnp.concatenate([jnp.zeros_like(row[:, :1]), short_index], 1)
    parts = HistoryLatents(
        short=short,
        mid=latents[:, long:mid] if config.mid else None,
        long=latents[:, :long] if config.long else None,
    )
    indices = FrameIndices(
        noisy=row[:, config.frames :],
        short=short_index,
        mid=row[:, long:mid] if config.mid else None,
        long=row[:, :long] if config.long else None,
    )
    return parts, indices
