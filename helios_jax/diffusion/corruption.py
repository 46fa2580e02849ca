"""What is done to the history in training so that the model lives with its own mistakes (paper section 3.3).

Random decisions are made per sample. A dropped frame is zero and stays zero through every corruption.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from helios_jax.diffusion.memory import MemoryConfig


@dataclass(unsafe_hash=True)
class DropConfig:
    """How often history is dropped, so that one model learns text, image and video to video.

    `t2v`: all of it. Else `i2v`: all but the last frame. Else `v2v`: the oldest frames, down to a random number of
    whole chunks. (Upstream's random_drop_*_ratio.)
    """

    t2v: float = 0.4
    i2v: float = 0.0
    v2v: float = 0.4

    def __post_init__(self) -> None:
        for name in ("t2v", "i2v", "v2v"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a probability between 0 and 1, got {getattr(self, name)}")


@dataclass(unsafe_hash=True)
class CorruptionConfig:
    """Noise on each history frame: x becomes sigma * noise + (1 - sigma) * x, sigma uniform in [0, `noise`].

    With probability `clean` a sample's history stays as it is.
    """

    noise: float = 1 / 3
    clean: float = 0.1

    def __post_init__(self) -> None:
        for name in ("noise", "clean"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")


def drop_history(
    key: Key[Array, ""],
    history: Float[Array, "b t h w c"],
    anchor: Float[Array, "b 1 h w c"],
    config: DropConfig,
    memory: MemoryConfig,
) -> tuple[Float[Array, "b t h w c"], Float[Array, "b 1 h w c"]]:
    """History and anchor with the oldest frames (and for t2v the anchor) set to zero, per sample."""
    b, frames = history.shape[:2]
    k_t2v, k_i2v, k_v2v, k_chunks = jax.random.split(key, 4)
    chunks = frames // memory.frames_per_chunk
    dropped_chunks = jax.random.randint(k_chunks, (b,), 0, chunks + 1)
    v2v = jnp.where(
        jax.random.uniform(k_v2v, (b,)) < config.v2v,
        frames % memory.frames_per_chunk + dropped_chunks * memory.frames_per_chunk,
        0,
    )
    partly = jnp.where(jax.random.uniform(k_i2v, (b,)) < config.i2v, frames - 1, v2v)
    t2v = jax.random.uniform(k_t2v, (b,)) < config.t2v
    drop = jnp.where(t2v, frames, partly)
    kept = jnp.arange(frames)[None] >= drop[:, None]
    return history * kept[..., None, None, None], anchor * ~t2v[:, None, None, None, None]


def corrupt_history(
    key: Key[Array, ""],
    history: Float[Array, "b t h w c"],
    anchor: Float[Array, "b 1 h w c"],
    config: CorruptionConfig,
) -> tuple[Float[Array, "b t h w c"], Float[Array, "b 1 h w c"]]:
    """History and anchor with noise, its strength drawn for every frame."""
    frames = jnp.concatenate([anchor, history], 1)
    k_clean, k_sigma, k_noise = jax.random.split(key, 3)
    b, t = frames.shape[:2]
    clean = jax.random.uniform(k_clean, (b, 1)) < config.clean
    sigma = jnp.where(clean, 0.0, jax.random.uniform(k_sigma, (b, t)) * config.noise)[..., None, None, None]
    dropped = (frames == 0).all((2, 3, 4), keepdims=True)
    noisy = sigma * jax.random.normal(k_noise, frames.shape) + (1 - sigma) * frames
    frames = jnp.where(dropped, frames, noisy)
    return frames[:, 1:], frames[:, :1]
