"""AdamW with warm-up, clipping and weight decay on matrices only."""

from typing import Any

import jax
import optax
from flax import nnx

from helios_jax.training.config import OptimConfig


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
    """Which parameters weight decay shrinks: those with two named dimensions or more, not biases and norm scales.

    A parameter stacked over layers has one dimension more than names, so the names count.
    """
    return jax.tree.map(lambda p: len(p.axes) > 1, model, is_leaf=lambda x: isinstance(x, nnx.Variable))


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW in float32."""
    adamw = optax.adamw(
        learning_rate(config, steps), *config.betas, eps=config.eps, weight_decay=config.weight_decay, mask=decayed
    )
    return adamw if config.clip_norm is None else optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
