"""What a training run carries from step to step: one pytree, made straight into its shardings."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from jax.sharding import Mesh

from helios_jax.sharding import shardings
from helios_jax.training.config import EMAConfig


@struct.dataclass
class TrainState:
    """`step` steps have been taken; `ema` is the average of `model` over them, or None."""

    step: jax.Array
    model: Any
    opt_state: Any
    ema: Any

    @property
    def best(self) -> nnx.Module:
        """The model to evaluate and to export: the average when there is one."""
        return self.model if self.ema is None else self.ema


def create(model: Any, optimizer: optax.GradientTransformation, ema: EMAConfig | None) -> TrainState:
    """The state before the first step."""
    average = None if ema is None else jax.tree.map(lambda x: jnp.array(x, jnp.float32), model)
    return TrainState(step=jnp.zeros((), jnp.int32), model=model, opt_state=optimizer.init(model), ema=average)


def init_sharded(
    init: Callable[[jax.Array], nnx.Module],
    key: jax.Array,
    optimizer: optax.GradientTransformation,
    ema: EMAConfig | None,
    mesh: Mesh,
    load: Callable[[Any, Any], nnx.Module] | None = None,
) -> TrainState:
    """`create(init(key))` where no device ever holds more than its shard.

    With `load`, the parameters are `load(abstract model, its shardings)` instead, and nothing random is computed.
    """

    def make(key: jax.Array) -> TrainState:
        return create(init(key), optimizer, ema)

    abstract = jax.eval_shape(make, key)
    target = shardings(abstract, mesh)
    if load is None:
        return jax.jit(make, out_shardings=target)(key)
    model = load(abstract.model, target.model)
    return jax.jit(lambda model: create(model, optimizer, ema), out_shardings=target, donate_argnums=0)(model)


def abstract_like(state: TrainState) -> TrainState:
    """Shapes, dtypes and shardings of a state, for restoring another one in its place."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def update(state: TrainState, grads: Any, optimizer: optax.GradientTransformation, ema: EMAConfig | None) -> TrainState:
    """The state after one optimiser step with `grads`."""
    changes, opt_state = optimizer.update(grads, state.opt_state, state.model)
    model = optax.apply_updates(state.model, changes)
    average = state.ema
    if ema is not None:
        keep = jnp.where(state.step < ema.start, 0.0, ema.decay)
        average = jax.tree.map(lambda a, x: keep * a + (1 - keep) * x.astype(jnp.float32), state.ema, model)
    return TrainState(step=state.step + 1, model=model, opt_state=opt_state, ema=average)
