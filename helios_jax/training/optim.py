"""AdamW with warm-up, clipping and weight decay on matrices only."""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from helios_jax.config import require


@dataclass
class EMAConfig:
    """A running average of the parameters, kept in float32; until step `start` it equals them.

    It moves every `every` steps: in stage 3 as often as the generator, which is every `critic.steps_per_generator`.
    With `ramp`, move s after `start` keeps at most (1 + s) / (10 + s) of the average, and the first one nothing: a
    young average forgets faster (as in upstream's code). Without, every move keeps `decay`.
    """

    decay: float = 0.999
    start: int = 0
    every: int = 1
    ramp: bool = True

    def __post_init__(self):
        require(0.0 < self.decay < 1.0, f"decay must be between 0 and 1, got {self.decay}")
        require(self.start >= 0, f"start must not be negative, got {self.start}")
        require(self.every > 0, f"every must be at least 1, got {self.every}")


def kept(ema: EMAConfig, step: jax.Array) -> jax.Array:
    """Share of the average that stays in the move after step `step`: 0 before `start`, 1 where it does not move."""
    share = jnp.float32(ema.decay)
    if ema.ramp:
        move = jnp.maximum(step // ema.every - -(-ema.start // ema.every), 0)
        share = jnp.where(move == 0, 0.0, jnp.minimum(share, (1 + move) / (10 + move)))
    return jnp.where(step < ema.start, 0.0, jnp.where(step % ema.every == 0, share, 1.0))


@dataclass
class OptimConfig:
    """AdamW; the learning rate climbs linearly for `warmup_steps`, then stays or falls to `final_lr` as a cosine.

    `accumulate` cuts a batch into that many parts, whose gradients are added up one after the other: less memory, the
    same step.
    """

    lr: float = 5e-5
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-4  # of matrices and kernels only: biases and scales of norms are left alone
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    final_lr: float = 0.0
    clip_norm: float | None = 1.0
    accumulate: int = 1
    ema: EMAConfig | None = None

    def __post_init__(self):
        require(self.lr > 0, f"lr must be above 0, got {self.lr}")
        require(all(0 <= b < 1 for b in self.betas), f"betas must lie in [0, 1), got {self.betas}")
        require(self.eps > 0, f"eps must be above 0, got {self.eps}")
        require(self.weight_decay >= 0, f"weight_decay must not be negative, got {self.weight_decay}")
        require(self.warmup_steps >= 0, f"warmup_steps must not be negative, got {self.warmup_steps}")
        require(0 <= self.final_lr <= self.lr, f"final_lr must lie between 0 and lr={self.lr}, got {self.final_lr}")
        require(
            self.clip_norm is None or self.clip_norm > 0,
            f"clip_norm must be above 0, or null for no clipping, got {self.clip_norm}",
        )
        require(self.accumulate > 0, f"accumulate must be at least 1, got {self.accumulate}")


def learning_rate(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear from 0 over `warmup_steps`, then constant or a cosine to `final_lr` at `steps`."""
    if config.schedule == "constant":
        after = optax.constant_schedule(config.lr)
    else:
        length = max(1, steps - config.warmup_steps)
        after = optax.cosine_decay_schedule(config.lr, length, alpha=config.final_lr / config.lr)
    if not config.warmup_steps:
        return after
    # The first step already moves: the ramp starts one step in.
    ramp = optax.linear_schedule(config.lr / config.warmup_steps, config.lr, config.warmup_steps - 1 or 1)
    return optax.join_schedules([ramp, after], [config.warmup_steps])


def decayed(model: nnx.Module) -> Any:
    """Mask of the parameters that weight decay shrinks: two named dimensions or more, so no biases and no norm scales.

    A parameter stacked over layers has one dimension more than names, so the names count.
    """
    return jax.tree.map(lambda p: len(p.axes) > 1, model, is_leaf=lambda x: isinstance(x, nnx.Variable))


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW in float32."""
    adamw = optax.adamw(
        learning_rate(config, steps), *config.betas, eps=config.eps, weight_decay=config.weight_decay, mask=decayed
    )
    return adamw if config.clip_norm is None else optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
