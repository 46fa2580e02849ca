"""What a call's sizes mean: chunks, latent shapes, steps. Needs configs only, so that errors come before weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from helios_jax.diffusion.memory import MemoryConfig
from helios_jax.diffusion.schedule import SchedulerConfig, sigmas
from helios_jax.diffusion.solvers import Steps, make_steps
from helios_jax.models.transformer import TransformerConfig
from helios_jax.models.vae import VAEConfig

HISTORY_SIZES = (16, 2, 1)


@dataclass(frozen=True)
class Plan:
    """A video's sizes. `latent_shape` is [t, h, w, c] of a chunk, `frames_per_chunk` counts pixel frames."""

    num_frames: int
    num_chunks: int
    frames_per_chunk: int
    latent_shape: tuple[int, int, int, int]
    memory: MemoryConfig
    steps: Steps


def make_plan(
    transformer: TransformerConfig,
    vae: VAEConfig,
    scheduler: SchedulerConfig,
    *,
    height: int = 384,
    width: int = 640,
    num_frames: int = 132,
    num_inference_steps: int = 50,
    history_sizes: Sequence[int] = HISTORY_SIZES,
    num_latent_frames_per_chunk: int = 9,
) -> Plan:
    """Arguments are those of `HeliosPipeline`; raises ValueError that names the one that cannot be."""
    space = vae.scale_factor_spatial
    check_size(height, width, multiple=space * math.lcm(*transformer.patch_size[1:]))
    for name, value in {"num_frames": num_frames, "num_inference_steps": num_inference_steps}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if len(history_sizes) != 3:
        raise ValueError(f"history_sizes must be three numbers (long, mid, short), got {list(history_sizes)}")
    long, mid, recent = sorted(history_sizes, reverse=True)
    memory = MemoryConfig(long=long, mid=mid, recent=recent, frames_per_chunk=num_latent_frames_per_chunk)
    shape = (num_latent_frames_per_chunk, height // space, width // space, transformer.in_channels)
    frames = (num_latent_frames_per_chunk - 1) * vae.scale_factor_temporal + 1
    tokens = math.prod(shape[:3]) // math.prod(transformer.patch_size)
    return Plan(
        num_frames=num_frames,
        num_chunks=-(-num_frames // frames),
        frames_per_chunk=frames,
        latent_shape=shape,
        memory=memory,
        steps=make_steps(scheduler, sigmas(scheduler, num_inference_steps, tokens)),
    )


def check_size(height: int, width: int, multiple: int) -> None:
    """Raises ValueError unless both sizes are positive multiples; names the nearest that are."""
    for name, value in {"height": height, "width": width}.items():
        if value < multiple or value % multiple:
            below = value // multiple * multiple
            near = f"{below} and {below + multiple}" if below > 0 else str(multiple)
            raise ValueError(f"{name} must be a multiple of {multiple}, got {value}: the nearest is {near}")
