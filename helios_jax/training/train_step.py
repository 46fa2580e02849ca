"""Training step of all stages: gradients of the players, one after the other, and the update of the state."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Key

from helios_jax.runtime import offload
from helios_jax.sharding import BATCH
from helios_jax.training.gradients import with_gradient
from helios_jax.training.run_config import TrainConfig
from helios_jax.training.stage import Metrics, Player, Stage
from helios_jax.training.state import TrainState, placements, update

Step = Callable[[TrainState, Any, jax.Array], tuple[TrainState, Metrics]]


@dataclass(frozen=True)
class Accumulation:
    """Gradient accumulation over `parts` parts of a batch, on `mesh`; `shardings` are those of the parameters."""

    parts: int
    shardings: Any
    mesh: Mesh


def make_step(stage: Stage[Any, Any], optimizer: optax.GradientTransformation, state: TrainState, mesh: Mesh) -> Step:
    """Makes the jitted `(state, batch, seed key) -> (state, metrics)`, which donates the old state's memory to the new.

    Each sample of a step has its own key, from `fold_in(seed key, step)`. So a resumed run draws the same as an
    uninterrupted one, and gradient accumulation draws the same as a whole batch.
    """
    config: TrainConfig = stage.config
    placed, host = placements(state, mesh, config.optim.offload), config.optim.offload is not None
    parts = config.optim.accumulate
    accumulation = Accumulation(parts, placed.params, mesh) if parts > 1 else None

    def step(state: TrainState, batch: Any, seed_key: jax.Array) -> tuple[TrainState, Metrics]:
        keys = jax.random.split(jax.random.fold_in(seed_key, state.step), len(jax.tree.leaves(batch)[0]))
        (loss, metrics), grads = gradients(stage, state, batch, keys, accumulation, host=host)
        metrics = {"loss": loss, "grad_norm": optax.global_norm(grads), **metrics}
        return update(state, grads, optimizer, config.optim.ema, host=host), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(placed, None))


def gradients(
    stage: Stage[Any, Any],
    state: TrainState,
    batch: dict[str, Any],
    keys: Key[Array, " b"],
    accumulation: Accumulation | None = None,
    *,
    host: bool = False,
) -> tuple[tuple[Float[Array, ""], Metrics], Any]:
    """((loss, metrics), gradients) of the players whose turn it is; the gradients are those of `state.params`.

    With `host`, the gradients of one player wait in host memory while the next player's are computed.
    """
    loss, metrics, grads, inputs = jnp.zeros(()), {}, [], (batch, keys)
    for player in stage.players():
        if host and grads:  # the previous player's gradients wait in host memory
            grads[-1] = offload.stacked_to_host(grads[-1])
        # A player starts after these gradients are done: two players' activations are never in memory together.
        inputs, grads = jax.lax.optimization_barrier((inputs, grads))
        gradient = partial(_of_player, player, state, accumulation)
        (value, more), own = player.take(state.step, gradient, inputs)
        loss, metrics, grads = loss + value, {**metrics, **more}, [*grads, own]
    if host:  # no gradients come back before the last player's are computed
        grads = offload.to_device(jax.lax.optimization_barrier(grads))
    return (loss, metrics), nnx.merge_state(*grads)


def losses(
    stage: Stage[Any, Any], model: Any, batch: dict[str, Any], keys: Key[Array, " b"]
) -> tuple[Float[Array, ""], Metrics]:
    """(loss, metrics) of the players whose turn it is at `batch["step"]`, without gradients."""
    loss, metrics = jnp.zeros(()), {}
    for player in stage.players():
        value, more = player.take(batch["step"], player.loss, model, batch, keys)
        loss, metrics = loss + value, {**metrics, **more}
    return loss, metrics


def _of_player(player: Player, state: TrainState, accumulation: Accumulation | None, inputs: Any) -> Any:
    """((loss, metrics as (sum, divisor)), gradients) of a player; loss and gradients are means over the batch."""
    own, others = nnx.split_state(state.params, player.trains, ...)

    def gradient(batch: Any, keys: jax.Array, total: Any = None) -> Any:
        """Computes loss, metrics and gradients of a part of the batch; the gradients are added to `total`."""

        def loss(own: Any) -> tuple[jax.Array, Metrics]:
            model = nnx.merge(state.graph, own, others, state.frozen)
            value, metrics = player.loss(model, {**batch, "step": state.step}, keys)
            value = value if total is None else with_gradient(value, own, total)
            return value, {name: x if isinstance(x, tuple) else (x, 1) for name, x in metrics.items()}

        return jax.value_and_grad(loss, has_aux=True)(own)

    if accumulation is None:
        return gradient(*inputs)
    shardings = nnx.filter_state(accumulation.shardings, player.trains)
    (loss, metrics), grads = _accumulate(gradient, inputs, accumulation.parts, shardings, accumulation.mesh)
    loss, grads = jax.tree.map(lambda x: x / accumulation.parts, (loss, grads))
    return (loss, metrics), grads


def _accumulate(gradient: Callable[..., Any], inputs: Any, parts: int, shardings: Any, mesh: Mesh) -> Any:
    """Gradient accumulation: the sums of `gradient` over `parts` parts of a batch, one part after the other."""
    sharding = NamedSharding(mesh, PartitionSpec(None, BATCH))

    def divide(x: jax.Array) -> jax.Array:
        # Part i takes every parts-th sample, from i on: no sample leaves its device.
        x = x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(x, sharding)

    def add(total: Any, part: Any) -> tuple[Any, None]:
        values, grads = gradient(*part, total[1])
        return (jax.tree.map(jnp.add, total[0], values), jax.lax.with_sharding_constraint(grads, shardings)), None

    divided = jax.tree.map(divide, inputs)
    shapes = jax.eval_shape(gradient, *jax.tree.map(lambda x: x[0], divided))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, zeros, divided)[0]
