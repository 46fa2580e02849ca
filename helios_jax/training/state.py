"""State of a training run: one pytree, made straight into its shardings."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
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

GROUP = 2**30  # bytes of the parameters whose state comes from the host's memory at a time


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

    def step(opt_state: Any, average: Any) -> tuple[Any, Any, Any]:
        changes, opt_state = optimizer.update(grads, opt_state, state.params)
        params: Any = optax.apply_updates(state.params, changes)
        if ema is not None:
            keep = kept(ema, state.step)
            flat = dict(nnx.to_flat_state(params))
            now = nnx.from_flat_state([(path, flat[path]) for path, _ in nnx.to_flat_state(average)])
            average = jax.tree.map(lambda a, x: keep * a + (1 - keep) * x.astype(jnp.float32), average, now)
        return params, opt_state, average

    run = partial(_by_groups, step, state.params) if host else step
    params, opt_state, average = run(state.opt_state, state.ema)
    return dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state, ema=average)


def _by_groups(step: Callable[[Any, Any], Any], params: Any, opt_state: Any, average: Any) -> tuple[Any, Any, Any]:
    """`step` where its arguments wait in the host's memory: they come to the device and go back a few at a time.

    The step of an array must not depend on the state of another. Each group takes the step with zeros in place of all
    other state, and only its own arrays of the result count: the compiler leaves out the rest.
    """
    sizes = {jax.tree_util.keystr(path): x.nbytes for path, x in jax.tree.leaves_with_path(params)}
    groups, full = {}, 0
    for name, size in sizes.items():
        groups[name] = full // GROUP
        full += size

    def group(path: Any) -> int | None:
        """The group of the parameter at the end of a path; None for a counter."""
        text = jax.tree_util.keystr(path)
        return next((groups[text[i:]] for i in range(len(text)) if text[i:] in groups), None)

    waiting = opt_state, average
    leaves, structure = jax.tree.flatten(waiting)
    places = [group(path) for path, _ in jax.tree.leaves_with_path(waiting)]
    found, gone = list(jax.tree.leaves((params, *waiting))), []
    shares = [*groups.values(), *places]
    for number in sorted(set(groups.values())):
        mine, gone = jax.lax.optimization_barrier(([x for x, n in zip(leaves, places) if n == number], gone))
        come = iter(memories.to_device(mine))
        filled = [
            next(come) if n == number else x if n is None else jnp.zeros(x.shape, x.dtype)
            for x, n in zip(leaves, places)
        ]
        after = jax.tree.leaves(step(*jax.tree.unflatten(structure, filled)))
        stored = [*after[: len(groups)], *memories.to_host(after[len(groups) :])]
        found = [new if n in (number, None) else old for new, old, n in zip(stored, found, shares)]
        gone = [x for x, n in zip(stored[len(groups) :], places) if n == number]
    return jax.tree.unflatten(jax.tree.structure((params, *waiting)), found)


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
