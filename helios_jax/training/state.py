"""State of a training run: one pytree, made straight into its shardings."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from jax.sharding import Mesh

from helios_jax.runtime import offload as memories
from helios_jax.sharding import AnyMesh, shardings
from helios_jax.training.optim import EMAConfig, Offload, kept
from helios_jax.training.trainable import ALL, check, settle_dtypes, trainable


@struct.dataclass
class TrainState:
    """`step` steps have been taken.

    `params` are the parameters that are trained, in float32; `ema` is their average over the steps, or None: of all, or
    of those that the model's class names with a filter, `AVERAGED`. `frozen` is the rest of the model, which no step
    changes and no checkpoint holds; `frozen_digest` [2] tells one from another, None when nothing is frozen. `graph`
    puts the two together.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any
    frozen: Any
    frozen_digest: Any
    graph: Any = struct.field(pytree_node=False)

    @property
    def model(self) -> Any:
        """The model as it is after the last step."""
        return nnx.merge(self.graph, self.params, self.frozen)

    @property
    def best(self) -> Any:
        """The model to evaluate and to export: the average when there is one, where there is one."""
        if self.ema is None:
            return self.model
        average = memories.on_device(self.ema)
        return nnx.merge(self.graph, nnx.merge_state(self.params, average), self.frozen)


def create(
    model: nnx.Module, optimizer: optax.GradientTransformation, ema: EMAConfig | None, names: Sequence[str] = (ALL,)
) -> TrainState:
    """The state before the first step, of a run that trains the parameters `names` (`training.trainable`)."""
    graph, params, frozen = nnx.split(model, trainable(names), ...)
    averaged = nnx.filter_state(params, getattr(type(model), "AVERAGED", ...))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        ema=None if ema is None else jax.tree.map(lambda x: jnp.array(x, jnp.float32), averaged),
        frozen=frozen,
        frozen_digest=digest(frozen),
        graph=graph,
    )


def init_sharded(
    init: Callable[[jax.Array], nnx.Module],
    key: jax.Array,
    optimizer: optax.GradientTransformation,
    ema: EMAConfig | None,
    mesh: Mesh,
    load: Callable[[Any, Any], nnx.Module] | None = None,
    names: Sequence[str] = (ALL,),
    frozen_dtype: Any = jnp.float32,
    offload: Offload | None = None,
) -> TrainState:
    """`create(init(key))` where no device ever holds more than its shard.

    What is frozen is kept in `frozen_dtype`. With `load`, the parameters are `load(abstract model, its shardings)`
    instead, in the dtypes of the abstract model, and nothing random is computed.
    Raises ConfigError when one of `names` names no parameter.
    """

    def make(key: jax.Array) -> nnx.Module:
        return settle_dtypes(init(key), names, frozen_dtype)

    def begin(model: Any) -> TrainState:
        return create(model, optimizer, ema, names)

    target = jax.tree.map(lambda x: x.sharding, abstract(init, key, optimizer, ema, mesh, names, frozen_dtype, offload))
    if load is None:
        return jax.jit(lambda key: begin(make(key)), out_shardings=target)(key)
    model = jax.eval_shape(make, key)
    return jax.jit(begin, out_shardings=target, donate_argnums=0)(load(model, shardings(model, mesh)))


def abstract(
    init: Callable[[jax.Array], nnx.Module],
    key: jax.Array,
    optimizer: optax.GradientTransformation,
    ema: EMAConfig | None,
    mesh: Mesh,
    names: Sequence[str] = (ALL,),
    frozen_dtype: Any = jnp.float32,
    offload: Offload | None = None,
) -> TrainState:
    """The state that `init_sharded` makes, as shapes, dtypes and shardings: nothing is computed.

    Raises ConfigError when one of `names` names no parameter.
    """
    model = jax.eval_shape(lambda key: settle_dtypes(init(key), names, frozen_dtype), key)
    check(model, names)
    state = jax.eval_shape(lambda model: create(model, optimizer, ema, names), model)
    return placed(state, mesh, offload)


def placements(state: TrainState, mesh: AnyMesh, offload: Offload | None) -> TrainState:
    """A sharding for each array of a state, which may be abstract; with `offload` some in the hosts' memory."""
    found = shardings(state, mesh)
    if offload is None:
        return found
    opt_state, ema = (memories.waiting(x, y) for x, y in ((state.opt_state, found.opt_state), (state.ema, found.ema)))
    return dataclasses.replace(found, opt_state=opt_state, ema=ema)


def placed(state: TrainState, mesh: AnyMesh, offload: Offload | None) -> TrainState:
    """The shapes and dtypes of `state` with its `placements`."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        state,
        placements(state, mesh, offload),
    )


def abstract_like(state: TrainState) -> TrainState:
    """Shapes, dtypes and shardings of a state, for restoring another one in its place; what is frozen stays."""
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    return dataclasses.replace(abstract, frozen=state.frozen, frozen_digest=state.frozen_digest)


def update(
    state: TrainState,
    grads: Any,
    optimizer: optax.GradientTransformation,
    ema: EMAConfig | None,
    *,
    host: bool = False,
) -> TrainState:
    """The state after one optimiser step with `grads`; with `host`, optimiser state and average wait in its memory."""
    fetch, store = (memories.to_device, memories.to_host) if host else (lambda x: x, lambda x: x)
    changes, opt_state = optimizer.update(grads, fetch(state.opt_state), state.params)
    params: Any = optax.apply_updates(state.params, changes)
    average = state.ema
    if ema is not None:
        keep = kept(ema, state.step)
        flat = dict(nnx.to_flat_state(params))
        now = nnx.from_flat_state([(path, flat[path]) for path, _ in nnx.to_flat_state(state.ema)])
        average = jax.tree.map(lambda a, x: keep * a + (1 - keep) * x.astype(jnp.float32), fetch(state.ema), now)
    return dataclasses.replace(
        state, step=state.step + 1, params=params, opt_state=store(opt_state), ema=store(average)
    )


def digest(frozen: Any) -> jax.Array | None:
    """Two sums over the bits of all values, the same on every mesh; None for nothing."""
    leaves = jax.tree.leaves(frozen)
    if not leaves:
        return None
    total = jnp.zeros(2, jnp.uint32)
    for i, leaf in enumerate(leaves):
        bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}").astype(jnp.uint32)
        total += jnp.stack([bits.sum(dtype=jnp.uint32), (bits * bits).sum(dtype=jnp.uint32)]) * jnp.uint32(2 * i + 1)
    return total
