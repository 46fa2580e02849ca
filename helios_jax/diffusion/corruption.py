"""Damage to the history in training, so that the model learns to correct its own errors (paper section 3.3).

Random decisions are made per sample, from the sample's own key; upstream makes most of them once for a batch. A frame
that was dropped, or that lies before the video's beginning, is zero and stays zero through every corruption.
"""

from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from helios_jax.diffusion.memory import MemoryConfig
from helios_jax.diffusion.noising import add_noise


def _check_probabilities(config: object, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name} is a probability between 0 and 1, got {getattr(config, name)}")


@dataclass(unsafe_hash=True)
class DropConfig:
    """Probabilities of dropping history, so that one model learns text, image and video to video.

    `t2v` drops all of it and the anchor. Otherwise, `i2v` drops all but the last frame, as if an image had been given;
    the anchor stays. Otherwise, `v2v` drops the oldest frames, down to a random number of whole chunks. (Upstream's
    random_drop_*_ratio.)
    """

    t2v: float = 0.4
    i2v: float = 0.1
    v2v: float = 0.4

    def __post_init__(self) -> None:
        _check_probabilities(self, "t2v", "i2v", "v2v")


@dataclass(unsafe_hash=True)
class BlurConfig:
    """Blur: sections are resized by a factor uniform in [`smallest`, `largest`] and back, bilinearly.

    `probability` is the share of corrupted samples that get blur in place of noise.
    """

    probability: float = 0.1
    smallest: float = 0.9
    largest: float = 1.0

    def __post_init__(self) -> None:
        _check_probabilities(self, "probability")
        if not 0 < self.smallest <= self.largest <= 1:
            raise ValueError(
                f"smallest must lie between 0 and largest ({self.largest}, at most 1), got {self.smallest}"
            )


@dataclass(unsafe_hash=True)
class SaturationConfig:
    """Saturation: the channels of a section move towards their mean, or away from it, by one factor per section.

    The factor is uniform in [`smallest`, 1) or in (1, `largest`], each half of the time. A section stays unchanged with
    probability `clean`, the anchor always.
    """

    smallest: float = 0.3
    largest: float = 1.7
    clean: float = 0.1

    def __post_init__(self) -> None:
        _check_probabilities(self, "clean")
        if not 0 <= self.smallest < 1 < self.largest:
            raise ValueError(f"smallest must be below 1 and largest above, got {self.smallest} and {self.largest}")


@dataclass(unsafe_hash=True)
class CorruptionConfig:
    """Easy anti-drifting: noise or blur, then saturation.

    With probability `clean` a sample's history gets neither noise nor blur. Else it gets `blur` with that config's
    probability, or noise: x becomes sigma * noise + (1 - sigma) * x, sigma uniform in [0, `noise`], drawn for each
    frame or for each section. The defaults are the authors' corrections (upstream's corrupt_mode_history "random" and
    is_add_saturation); the released weights were trained with blur and saturation null.
    """

    noise: float = 1 / 3
    per: Literal["frame", "section"] = "frame"
    clean: float = 0.1
    blur: BlurConfig | None = field(default_factory=BlurConfig)
    saturation: SaturationConfig | None = field(default_factory=SaturationConfig)

    def __post_init__(self) -> None:
        _check_probabilities(self, "clean")
        if not 0 <= self.noise <= 1:
            raise ValueError(f"noise must lie between 0 and 1, got {self.noise}")

    @property
    def is_nothing(self) -> bool:
        """True if no history would change."""
        blurs = self.blur is not None and self.blur.probability > 0
        saturates = self.saturation is not None and self.saturation.clean < 1
        return not saturates and (self.clean == 1 or not (blurs or self.noise > 0))


def sections(memory: MemoryConfig) -> tuple[int, ...]:
    """The section of each history frame, oldest first: frames that are blurred or saturated alike.

    Chunks are counted from the last frame; frames before the first whole chunk are a section of their own. The last
    chunk is two sections, its first `mid` frames and the rest. (As in upstream's code; the split is not where the mid
    history begins.)
    """
    size = memory.frames_per_chunk
    tail, chunks = memory.frames % size, memory.frames // size
    lengths = [tail, *[size] * (chunks - 1), *([min(memory.mid, size), max(size - memory.mid, 0)] if chunks else [])]
    return tuple(i for i, length in enumerate(lengths) for _ in range(length))


def drop_history(
    keys: Key[Array, " b"],
    history: Float[Array, "b t h w c"],
    anchor: Float[Array, "b 1 h w c"],
    config: DropConfig,
    memory: MemoryConfig,
) -> tuple[Float[Array, "b t h w c"], Float[Array, "b 1 h w c"]]:
    """History and anchor with the oldest frames (and for t2v the anchor) set to zero, per sample."""
    frames, size = history.shape[1], memory.frames_per_chunk

    def draw(key: Array) -> tuple[Array, Array]:
        u = jax.random.uniform(key, (4,))
        chunks = frames % size + size * jnp.floor(u[3] * (frames // size + 1)).astype(jnp.int32)
        v2v = jnp.where(u[2] < config.v2v, chunks, 0)
        partly = jnp.where(u[1] < config.i2v, frames - 1, v2v)
        return jnp.where(u[0] < config.t2v, frames, partly), u[0] < config.t2v

    dropped, t2v = jax.vmap(draw)(keys)
    kept = jnp.arange(frames)[None] >= dropped[:, None]
    return history * kept[..., None, None, None], anchor * ~t2v[:, None, None, None, None]


def corrupt_history(
    keys: Key[Array, " b"],
    history: Float[Array, "b t h w c"],
    anchor: Float[Array, "b 1 h w c"],
    config: CorruptionConfig,
    memory: MemoryConfig,
) -> tuple[Float[Array, "b t h w c"], Float[Array, "b 1 h w c"]]:
    """Corrupts history and anchor, so that they look as if a model that makes errors had generated them."""
    count = 1 + max(sections(memory), default=0)
    # The anchor is a section of its own, the last.
    section = jnp.asarray((count, *sections(memory)))

    def corrupt(key: Array, frames: Array) -> Array:
        # All uniform numbers are drawn at once: every separate draw takes seconds to compile.
        strengths = len(frames) if config.per == "frame" else count + 1
        k_uniform, k_noise = jax.random.split(key)
        sizes = (2, strengths, count + 1, 3 * count)
        u, strength, ratio, factor = jnp.split(jax.random.uniform(k_uniform, (sum(sizes),)), np.cumsum(sizes)[:-1])
        sigma = config.noise * (strength if config.per == "frame" else strength[section])
        out = add_noise(frames, jax.random.normal(k_noise, frames.shape), sigma)
        if config.blur is not None:
            low, high = config.blur.smallest, config.blur.largest
            blurred = blur(frames, (low + (high - low) * ratio)[section])
            out = jnp.where(u[1] < config.blur.probability, blurred, out)
        out = jnp.where(u[0] < config.clean, frames, out)
        if config.saturation is not None:
            factor = _saturation(factor.reshape(3, count), config.saturation)
            out = saturate(out, jnp.append(factor, 1.0)[section])
        return jnp.where(_is_zero(frames), frames, out)

    frames = jax.vmap(corrupt)(keys, jnp.concatenate([anchor, history], 1))
    return frames[:, 1:], frames[:, :1]


def _saturation(u: Float[Array, "3 sections"], config: SaturationConfig) -> Float[Array, " sections"]:
    """Each section's factor, from uniform numbers."""
    low = config.smallest + (1 - 1e-3 - config.smallest) * u[2]
    high = 1 + 1e-3 + (config.largest - 1 - 1e-3) * u[2]
    return jnp.where(u[0] < config.clean, 1.0, jnp.where(u[1] < 0.5, low, high))


def _is_zero(frames: Float[Array, "t h w c"]) -> Bool[Array, "t 1 1 1"]:
    return (frames == 0).all((1, 2, 3), keepdims=True)


def blur(frames: Float[Array, "t h w c"], ratio: Float[Array, " t"]) -> Float[Array, "t h w c"]:
    """Each frame resized to its own `ratio` of its size and back, bilinearly and antialiased."""
    rows, columns = (jax.vmap(lambda r, n=n: _down_up(r, n))(ratio) for n in frames.shape[1:3])
    return jnp.einsum("thi,twj,tijc->thwc", rows, columns, frames, precision=jax.lax.Precision.HIGHEST)


def saturate(frames: Float[Array, "t h w c"], factor: Float[Array, " t"]) -> Float[Array, "t h w c"]:
    """Scales each value's distance from the mean of its pixel's channels by the frame's factor; 1 changes no bit."""
    mean, factor = frames.mean(-1, keepdims=True), factor[:, None, None, None]
    return jnp.where(factor == 1, frames, (frames - mean) * factor + mean)


def _down_up(ratio: Float[Array, ""], size: int) -> Float[Array, "size size"]:
    """The matrix that resizes `size` values to about `ratio` times as many and back."""
    small = jnp.maximum(1, jnp.round(size * ratio))
    return _resize(small, size, size) @ _resize(size, small, size)


def _resize(inputs: Array | int, outputs: Array | int, size: int) -> Float[Array, "size size"]:
    """Weights [out, in] of antialiased bilinear resizing from `inputs` to `outputs` values; zero in the rest of `size`.

    `inputs` and `outputs` may be traced, because no shape depends on them.
    """
    scale = inputs / outputs
    place = jnp.arange(size, dtype=jnp.float32) + 0.5
    distance = jnp.abs(place[None] - place[:, None] * scale) / jnp.maximum(scale, 1.0)
    weights = jnp.maximum(0.0, 1.0 - distance) * (place[None] < inputs)
    total = weights.sum(1, keepdims=True)
    return jnp.where((place[:, None] < outputs) & (total > 0), weights / jnp.where(total > 0, total, 1.0), 0.0)
