"""Optimizers by optax's names, with warm-up and clipping, and the running average of the parameters."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from optax import contrib

from helios_jax.config import require

Name = Literal["adamw", "adam", "lion", "muon", "prodigy"]
Offload = Literal["host"]


@dataclass
class EMAConfig:
    """Exponential moving average of the parameters, kept in float32; until step `start` it equals them.

    It is updated every `every` steps; the distill stage needs `critic.steps_per_generator`, the generator's interval.
    With `ramp`, update s after `start` keeps at most (1 + s) / (10 + s) of the average, and update 0 keeps none of it:
    a young average forgets faster (as in upstream's code). Without, every update keeps `decay`.
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
    """Share of the average that its update after step `step` keeps: 0 before `start`, 1 where there is no update."""
    share = jnp.float32(ema.decay)
    if ema.ramp:
        move = jnp.maximum(step // ema.every - -(-ema.start // ema.every), 0)
        share = jnp.where(move == 0, 0.0, jnp.minimum(share, (1 + move) / (10 + move)))
    return jnp.where(step < ema.start, 0.0, jnp.where(step % ema.every == 0, share, 1.0))


@dataclass
class OptimConfig:
    """An optimizer, and its learning rate: a linear rise of `warmup_steps`, then constant or a cosine to `final_lr`.

    `betas`, `eps` and `weight_decay` are null for optax's defaults, and must be null where the optimizer takes none.
    `decayed` names the parameters that weight decay shrinks: all, as upstream, or matrices and kernels only, without
    biases and scales of norms. Muon orthogonalizes the updates of matrices and kernels and scales them to the size
    of AdamW's; AdamW, with `betas`, updates the other parameters. Prodigy estimates the learning rate; `lr` is a factor
    of the estimate.

    `accumulate` is the number of parts of a batch for gradient accumulation: less memory, the same step. With `offload`
    "host", the optimizer's state and the average stay in host memory and are on the devices only while they are
    updated. The gradients of a player wait in host memory, too, while the next player's are computed.
    """

    name: Name = "adamw"
    lr: float = 5e-5
    betas: tuple[float, float] | None = None
    eps: float | None = None
    weight_decay: float | None = None
    decayed: Literal["all", "matrices"] = "all"
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    final_lr: float = 0.0
    clip_norm: float | None = 1.0
    accumulate: int = 1
    ema: EMAConfig | None = None
    offload: Offload | None = None

    def __post_init__(self):
        takes = OPTIMIZERS[self.name].takes
        for key, absent in (("betas", None), ("eps", None), ("weight_decay", None), ("decayed", "all")):
            value, must = getattr(self, key), "null" if absent is None else absent
            require(
                key in takes or value == absent,
                f"{key} must be {must} for {self.name}, which has no such option, got {value}; set it to {must}, or "
                "name another optimizer",
            )
        require(self.lr > 0, f"lr must be above 0, got {self.lr}")
        require(
            self.name != "prodigy" or self.lr >= 0.1,
            f"lr must be 0.1 or more for prodigy, whose estimate it multiplies, got {self.lr}; set it to 1",
        )
        require(all(0 <= b < 1 for b in self.betas or ()), f"betas must lie in [0, 1), got {self.betas}")
        require(self.eps is None or self.eps > 0, f"eps must be above 0, got {self.eps}")
        require((self.weight_decay or 0) >= 0, f"weight_decay must not be negative, got {self.weight_decay}")
        require(self.warmup_steps >= 0, f"warmup_steps must not be negative, got {self.warmup_steps}")
        require(0 <= self.final_lr <= self.lr, f"final_lr must lie between 0 and lr={self.lr}, got {self.final_lr}")
        require(
            self.clip_norm is None or self.clip_norm > 0,
            f"clip_norm must be above 0, or null for no clipping, got {self.clip_norm}",
        )
        require(
            self.offload is None or self.name != "prodigy",
            "offload must be null for prodigy, whose step needs the state of all parameters at once",
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
    # The ramp starts one step in, so that the first step has a rate above 0.
    ramp = optax.linear_schedule(config.lr / config.warmup_steps, config.lr, config.warmup_steps - 1 or 1)
    return optax.join_schedules([ramp, after], [config.warmup_steps])


def rate_at(config: OptimConfig, steps: int, step: int) -> float:
    """The learning rate of step `step`, from 0, of an optimiser that takes `steps`."""
    return float(np.asarray(learning_rate(config, steps)(step)))


def _each(function: Callable[[nnx.Variable], Any], params: Any) -> Any:
    return jax.tree.map(function, params, is_leaf=lambda x: isinstance(x, nnx.Variable))


def matrices(params: Any) -> Any:
    """Mask of matrices and kernels: two named dimensions or more, so no biases and no scales of norms.

    A parameter stacked over layers has one dimension more than names, so the names count.
    """
    return _each(lambda p: len(p.axes) > 1, params)


def _muon_dimensions(params: Any) -> Any:
    """Muon's dimensions of matrices and kernels, where the last named one is the output; None leaves it to AdamW."""

    def numbers(p: Any) -> contrib.MuonDimensionNumbers | None:
        return contrib.MuonDimensionNumbers(tuple(range(-len(p.axes), -1)), -1) if len(p.axes) > 1 else None

    return _each(numbers, params)


class Optimizer(NamedTuple):
    """A function of optax, and the keys of OptimConfig that it takes beside the learning rate."""

    make: Callable[..., optax.GradientTransformation]
    takes: tuple[str, ...]


def _muon(rate: optax.Schedule, b1: float = 0.9, b2: float = 0.999, mask: Any = None, **more: Any) -> Any:
    return contrib.muon(
        rate,
        adam_b1=b1,
        adam_b2=b2,
        adam_weight_decay=0.0 if mask else more.get("weight_decay", 0.0),
        muon_weight_dimension_numbers=_muon_dimensions,
        consistent_rms=0.2,  # as large as AdamW's steps
        **more,
    )


def _prodigy(rate: optax.Schedule, b1: float = 0.9, b2: float = 0.999, **more: Any) -> Any:
    return contrib.prodigy(rate, (b1, b2), safeguard_warmup=True, **more)  # the safeguard as upstream


OPTIMIZERS = {
    "adamw": Optimizer(optax.adamw, ("betas", "eps", "weight_decay", "decayed")),
    "adam": Optimizer(optax.adam, ("betas", "eps")),
    "lion": Optimizer(optax.lion, ("betas", "weight_decay", "decayed")),
    "muon": Optimizer(_muon, ("betas", "eps", "weight_decay", "decayed")),
    "prodigy": Optimizer(_prodigy, ("betas", "eps", "weight_decay")),
}


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then the optimizer in float32."""
    options: dict[str, Any] = {"eps": config.eps, "weight_decay": config.weight_decay}
    options["b1"], options["b2"] = config.betas or (None, None)
    options["mask"] = matrices if config.decayed == "matrices" else None
    given = {key: value for key, value in options.items() if value is not None}
    optimizer = OPTIMIZERS[config.name].make(learning_rate(config, steps), **given)
    if config.clip_norm is None:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)


def on_turns(optimizer: optax.GradientTransformation, every: int) -> optax.GradientTransformation:
    """`optimizer` on every `every`-th step, the first included; on the others its state stays and updates are zero.

    Does the same as `optax.conditionally_mask`, with a `jnp.where` for each array instead of one `lax.cond`: a branch
    would need the whole state on the devices at once, while offloaded state is to come and go one array at a time.
    """

    def init(params: Any) -> optax.ConditionallyMaskState:
        return optax.ConditionallyMaskState(jnp.zeros((), jnp.int32), optimizer.init(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        turn = state.step % every == 0

        def chosen(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda x, y: jnp.where(turn, x, y), new, old)

        changes, inner = optimizer.update(updates, state.inner_state, params)
        still = jax.tree.map(jnp.zeros_like, changes)
        return chosen(changes, still), optax.ConditionallyMaskState(
            optax.safe_increment(state.step), chosen(inner, state.inner_state)
        )

    return optax.GradientTransformation(init, update)
