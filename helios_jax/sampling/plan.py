"""What a call means for a checkpoint: chunks, shapes, levels, steps. Needs configs only: errors come before weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp

from helios_jax.diffusion.denoise import Level
from helios_jax.diffusion.memory import MemoryConfig
from helios_jax.diffusion.schedule import (
    SchedulerConfig,
    sigmas,
    stage_table,
    stages,
    upsampling_weights,
)
from helios_jax.diffusion.solvers import make_steps
from helios_jax.models.transformer import TransformerConfig
from helios_jax.models.vae import VAEConfig

HISTORY_SIZES = (16, 2, 1)


@dataclass(frozen=True)
class Variant:
    """Which of the released kinds a checkpoint is, as its model_index.json says: Base (no pyramid), Mid, Distilled."""

    pyramid: bool = False
    is_cfg_zero_star: bool = False
    is_distilled: bool = False

    @property
    def name(self) -> str:
        return "Distilled" if self.is_distilled else "Mid (pyramid)" if self.pyramid else "Base"


@dataclass(frozen=True)
class Plan:
    """A video's sizes and steps. `latent_shape` is [t, h, w, c] of a chunk; `first_levels` are the first chunk's."""

    num_frames: int
    num_chunks: int
    latent_shape: tuple[int, int, int, int]
    memory: MemoryConfig
    levels: tuple[Level, ...]
    first_levels: tuple[Level, ...]
    guidance_scale: float | None
    zero_star: bool

    def block_shapes(self) -> list[tuple[int, int, int, int]]:
        """[t, h, w, c] of every level but the first, coarsest first."""
        t, h, w, c = self.latent_shape
        return [(t, h >> i, w >> i, c) for i in reversed(range(len(self.levels) - 1))]

    def num_steps(self, chunk: int) -> int:
        """Steps of a chunk, over all levels."""
        return sum(len(level.steps.sigma) for level in (self.levels if chunk else self.first_levels))


def make_plan(
    transformer: TransformerConfig,
    vae: VAEConfig,
    scheduler: SchedulerConfig,
    variant: Variant,
    *,
    height: int = 384,
    width: int = 640,
    num_frames: int = 132,
    num_inference_steps: int | None = None,
    pyramid_num_inference_steps_list: Sequence[int] | None = None,
    guidance_scale: float | None = None,
    use_zero_init: bool = True,
    zero_steps: int = 1,
    is_amplify_first_chunk: bool = False,
    history_sizes: Sequence[int] = HISTORY_SIZES,
    num_latent_frames_per_chunk: int = 9,
) -> Plan:
    """Arguments are those of `HeliosPipeline`; raises ValueError that names the one that cannot be."""
    counts = _step_counts(variant, scheduler, num_inference_steps, pyramid_num_inference_steps_list)
    if variant.is_distilled and guidance_scale is not None and guidance_scale > 1:
        raise ValueError(f"guidance_scale must be 1 for a Distilled checkpoint, got {guidance_scale}: leave it out")
    if is_amplify_first_chunk and not variant.is_distilled:
        raise ValueError(
            f"is_amplify_first_chunk is for Distilled checkpoints, this one is {variant.name}: leave it out"
        )
    if guidance_scale is None:
        guidance_scale = 1.0 if variant.is_distilled else 5.0
    guided = guidance_scale > 1

    space = vae.scale_factor_spatial
    check_size(height, width, multiple=space * math.lcm(*transformer.patch_size[1:]) * 2 ** (len(counts) - 1))
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    if len(history_sizes) != 3:
        raise ValueError(f"history_sizes must be three numbers (long, mid, short), got {list(history_sizes)}")
    long, mid, recent = sorted(history_sizes, reverse=True)
    memory = MemoryConfig(long=long, mid=mid, recent=recent, frames_per_chunk=num_latent_frames_per_chunk)
    shape = (num_latent_frames_per_chunk, height // space, width // space, transformer.in_channels)
    frames = (num_latent_frames_per_chunk - 1) * vae.scale_factor_temporal + 1

    def levels(counts: Sequence[int]) -> tuple[Level, ...]:
        stand = zero_steps + 1 if variant.is_cfg_zero_star and guided and use_zero_init else 0
        tokens = math.prod(shape[:3]) // math.prod(transformer.patch_size)
        return make_levels(scheduler, variant, counts, tokens, stand)

    return Plan(
        num_frames=num_frames,
        num_chunks=-(-num_frames // frames),
        latent_shape=shape,
        memory=memory,
        levels=levels(counts),
        first_levels=levels([2 * n for n in counts] if is_amplify_first_chunk else counts),
        guidance_scale=guidance_scale if guided else None,
        zero_star=variant.is_cfg_zero_star,
    )


def make_levels(
    scheduler: SchedulerConfig, variant: Variant, counts: Sequence[int], tokens: int, stand: int = 0
) -> tuple[Level, ...]:
    """The tables of all levels, coarsest first, for `tokens` at full size; the first `stand` steps stand still."""
    if not variant.pyramid:
        table = sigmas(scheduler, counts[0], tokens)
        return (Level(make_steps(scheduler, table[:-1] * scheduler.num_train_timesteps, table)),)
    out = []
    for i, (stage, count) in enumerate(zip(stages(scheduler), counts)):
        # A level's shift is that of the size it is entered from: the reference counts tokens before it upsamples.
        entered = tokens // 4 ** (len(counts) - 1 - max(i - 1, 0))
        table = stage_table(scheduler, stage, count, entered)
        steps = make_steps(scheduler, *table)
        if i == 0:
            moves = None if stand == 0 else (jnp.arange(count) >= stand).astype(jnp.float32)
            out.append(Level(steps, moves))
        else:
            alpha, beta = (jnp.asarray(x, jnp.float32) for x in upsampling_weights(stage.entry, scheduler.gamma))
            out.append(Level(steps, None, alpha, beta, scheduler.gamma))
    return tuple(out)


def _step_counts(
    variant: Variant, scheduler: SchedulerConfig, steps: int | None, pyramid: Sequence[int] | None
) -> list[int]:
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
        default = [2 if variant.is_distilled else 20] * scheduler.stages
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
    """Raises ValueError unless both sizes are positive multiples; names the nearest that are."""
    for name, value in {"height": height, "width": width}.items():
        if value < multiple or value % multiple:
            below = value // multiple * multiple
            near = f"{below} and {below + multiple}" if below > 0 else str(multiple)
            raise ValueError(f"{name} must be a multiple of {multiple}, got {value}: the nearest is {near}")
