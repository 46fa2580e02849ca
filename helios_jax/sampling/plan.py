"""The plan of a video: chunks, shapes, levels, steps. Configs suffice for it, so errors precede loading of weights."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from helios_jax.diffusion.denoise import Level
from helios_jax.diffusion.levels import make_levels
from helios_jax.diffusion.memory import MemoryConfig
from helios_jax.diffusion.pyramid import level_shapes
from helios_jax.diffusion.schedule import SchedulerConfig
from helios_jax.models.transformer import TransformerConfig
from helios_jax.models.vae import VAEConfig
from helios_jax.sampling.chunk_frames import ChunkFrames
from helios_jax.sampling.options import SamplingOptions
from helios_jax.trained import NAMES, Kind, Trained


@dataclass(frozen=True)
class Variant:
    """The released kind of a checkpoint, from its model_index.json: Base (no pyramid), Mid, Distilled.

    `trained_size` is the height and width in pixels of its training: 384 x 640 unless the file says otherwise.
    `trained` has other settings of the training, which sampling follows.
    """

    pyramid: bool = False
    is_cfg_zero_star: bool = False
    is_distilled: bool = False
    trained_size: tuple[int, int] = (384, 640)
    trained: Trained = field(default_factory=Trained)

    @property
    def kind(self) -> Kind:
        return "distilled" if self.is_distilled else "mid" if self.pyramid else "base"

    @property
    def name(self) -> str:
        """Name of the kind for messages."""
        return NAMES[self.kind]


@dataclass(frozen=True)
class Plan:
    """Sizes and steps of a video: the `latent_shape` [t, h, w, c] of a chunk, the pixel `frames` of chunks, and the
    `levels` of a chunk, `first_levels` for the first one. `num_chunks` is None for a video without end.

    `zero_init` is the number of a chunk's first steps that leave the sample as it is."""

    options: SamplingOptions
    num_chunks: int | None
    frames: ChunkFrames
    latent_shape: tuple[int, int, int, int]
    memory: MemoryConfig
    levels: tuple[Level, ...]
    first_levels: tuple[Level, ...]
    guidance_scale: float | None
    zero_star: bool
    zero_init: int

    def block_shapes(self) -> list[tuple[int, ...]]:
        """[t, h, w, c] of every level but the first, coarsest first."""
        return level_shapes(self.latent_shape, len(self.levels))[1:]

    def num_steps(self, chunk: int) -> int:
        """Steps of a chunk, over all levels."""
        return sum(len(level.steps.sigma) for level in (self.levels if chunk else self.first_levels))


def make_plan(
    transformer: TransformerConfig,
    vae: VAEConfig,
    scheduler: SchedulerConfig,
    variant: Variant,
    options: SamplingOptions,
) -> Plan:
    """The plan of `options` for a checkpoint. Raises ValueError, which names it, for an option that does not fit.

    Warns of a size that the weights were not trained at.
    """
    counts = _step_counts(variant, scheduler, options.num_inference_steps, options.pyramid_num_inference_steps_list)
    guidance_scale = options.guidance_scale
    if variant.is_distilled and guidance_scale is not None and guidance_scale > 1:
        raise ValueError(f"guidance_scale must be 1 for a Distilled checkpoint, got {guidance_scale}: leave it out")
    if options.is_amplify_first_chunk and not variant.is_distilled:
        raise ValueError(
            f"is_amplify_first_chunk is for Distilled checkpoints, this one is {variant.name}: leave it out"
        )
    if guidance_scale is None:
        guidance_scale = 1.0 if variant.is_distilled else 5.0
    guided = guidance_scale > 1
    if options.use_cfg_zero_star and not guided:
        raise ValueError(f"use_cfg_zero_star changes guidance, which is off at guidance_scale {guidance_scale:g}")
    zero_star = variant.is_cfg_zero_star if options.use_cfg_zero_star is None else options.use_cfg_zero_star
    zero_init = 0
    if zero_star and guided and options.use_zero_init:
        zero_init = options.zero_steps + 1
    elif options.zero_steps != SamplingOptions.zero_steps:
        raise ValueError(
            f"zero_steps is {options.zero_steps}, and this video has no such steps: leave it out, or set"
            " use_cfg_zero_star, use_zero_init and a guidance_scale above 1"
        )
    amplified = variant.trained.amplify_first_chunk and variant.is_distilled
    if options.is_amplify_first_chunk is not None:
        amplified = options.is_amplify_first_chunk

    height, width, space = options.height, options.width, vae.scale_factor_spatial
    check_size(height, width, multiple=space * math.lcm(*transformer.patch_size[1:]) * 2 ** (len(counts) - 1))
    if (height, width) != tuple(variant.trained_size):
        trained = " x ".join(map(str, variant.trained_size))
        warnings.warn(
            f"{height} x {width}: these weights were trained at {trained} only; expect worse videos", stacklevel=2
        )
    memory = sampling_memory(options, variant.trained.memory)
    shape = (memory.frames_per_chunk, height // space, width // space, transformer.in_channels)
    frames = frames_of_chunks(options, vae, variant)

    def levels(counts: Sequence[int]) -> tuple[Level, ...]:
        tokens = math.prod(shape[:3]) // math.prod(transformer.patch_size)
        return make_levels(
            scheduler,
            counts,
            tokens,
            pyramid=variant.pyramid,
            zero_init=zero_init,
            as_trained=variant.trained.training_times,
        )

    every = levels(counts)
    return Plan(
        options=options,
        num_chunks=None if options.num_frames is None else frames.chunks(options.num_frames),
        frames=frames,
        latent_shape=shape,
        memory=memory,
        levels=every,
        first_levels=levels([2 * n for n in counts]) if amplified else every,
        guidance_scale=guidance_scale if guided else None,
        zero_star=zero_star,
        zero_init=zero_init,
    )


def sampling_memory(options: SamplingOptions, trained: MemoryConfig) -> MemoryConfig:
    """The memory that weights were `trained` with, changed where `options` say otherwise.

    Warns of such changes. Raises ValueError for options that contradict one another.
    """
    changes: dict[str, Any] = {}
    if options.history_sizes is not None:
        changes |= zip(("long", "mid", "recent"), options.history_sizes)
    if options.num_latent_frames_per_chunk is not None:
        changes["frames_per_chunk"] = options.num_latent_frames_per_chunk
    if options.positions is not None:
        changes["positions"] = options.positions
    if options.use_anchor is not None:
        changes["anchor"] = "first" if options.use_anchor else None
    memory = replace(trained, **changes)
    if new := [name for name in changes if changes[name] != getattr(trained, name)]:
        now, was = (", ".join(f"{name} {getattr(one, name)}" for name in new) for one in (memory, trained))
        warnings.warn(f"{now}: these weights were trained at {was} only; expect worse videos", stacklevel=3)
    if options.is_skip_first_chunk:
        if memory.anchor is None:
            raise ValueError(
                "is_skip_first_chunk is about the anchor, and there is none: leave it out, or set use_anchor"
            )
        memory = replace(memory, anchor="second")
    if options.overlap_chunks and not 1 < memory.frames_per_chunk <= memory.frames:
        raise ValueError(
            "overlap_chunks needs chunks of 2 latent frames or more, and a history of a whole chunk; got"
            f" {memory.frames_per_chunk} and {memory.frames}: leave it out"
        )
    return memory


def frames_of_chunks(options: SamplingOptions, vae: VAEConfig, variant: Variant) -> ChunkFrames:
    """Pixel frames of the chunks of a video with `options`."""
    latents = options.num_latent_frames_per_chunk or variant.trained.memory.frames_per_chunk
    frames = (latents - 1) * vae.scale_factor_temporal + 1
    return ChunkFrames(frames, frames - options.overlap_chunks)


def _step_counts(
    variant: Variant, scheduler: SchedulerConfig, steps: int | None, pyramid: Sequence[int] | None
) -> list[int]:
    """Steps of each level, coarsest first. Raises ValueError for the option of another kind of checkpoint."""
    if not variant.pyramid:
        if pyramid is not None:
            raise ValueError(
                "pyramid_num_inference_steps_list is for pyramid checkpoints, this one is Base: use num_inference_steps"
            )
        counts = [50 if steps is None else steps]
    else:
        if steps is not None:
            raise ValueError(
                f"num_inference_steps is for Base checkpoints, this one is {variant.name}:"
                " use pyramid_num_inference_steps_list"
            )
        default = list(variant.trained.steps or [2 if variant.is_distilled else 20] * scheduler.stages)
        counts = default if pyramid is None else list(pyramid)
        if len(counts) != scheduler.stages:
            raise ValueError(
                f"pyramid_num_inference_steps_list needs {scheduler.stages} numbers, one per level, got {counts}"
            )
    if min(counts) < 1:
        name = "pyramid_num_inference_steps_list" if variant.pyramid else "num_inference_steps"
        raise ValueError(f"{name} must be at least 1, got {counts if variant.pyramid else counts[0]}")
    return counts


def check_size(height: int, width: int, multiple: int) -> None:
    """Raises ValueError unless height and width are positive multiples of `multiple`; it names the nearest ones."""
    for name, value in {"height": height, "width": width}.items():
        if value < multiple or value % multiple:
            below = value // multiple * multiple
            near = f"{below} and {below + multiple}" if below > 0 else str(multiple)
            raise ValueError(f"{name} must be a multiple of {multiple}, got {value}: the nearest is {near}")
