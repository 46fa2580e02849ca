"""State of a training run: one pytree, whose arrays are created in their shardings."""

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

GROUP = 2**30  # bytes of parameters whose offloaded state is on the device at a time


@struct.dataclass
class TrainState:
    """The state of a run after `step` steps.

    `params` are the trained parameters, in float32. `ema` is their moving average, or None; a model's class can limit
    it to some of them with an nnx filter, `AVERAGED`. `frozen` is the rest of the model, which no step changes and no
    checkpoint holds; `frozen_digest` [2] is its checksum, None when nothing is frozen. `graph` is the nnx graph that
    puts `params` and `frozen` together.
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
        """The model to evaluate and to export: each parameter's average if it has one, else the parameter."""
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

    Frozen parameters are kept in `frozen_dtype`. With `load`, the parameters are `load(abstract model, its shardings)`
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
    """Shapes, dtypes and shardings of a state, to restore another one in its place; frozen parameters stay arrays."""
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
    """The state after one optimiser step with `grads`; with `host`, optimiser state and average are in host memory."""

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
    """Calls `step` with arguments in host memory, of which one group at a time is moved to the device and back.

    The step of an array must not depend on the state of another. For each group, `step` is called with zeros in place
    of all other state, and only the group's own results are used: the compiler removes the rest.
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
    leaf_groups = [group(path) for path, _ in jax.tree.leaves_with_path(waiting)]
    results, moved_back = list(jax.tree.leaves((params, *waiting))), []
    result_groups = [*groups.values(), *leaf_groups]
    for number in sorted(set(groups.values())):
        mine = [x for x, n in zip(leaves, leaf_groups) if n == number]
        # A group is moved to the device only after the group before it is back on the host.
        mine, moved_back = jax.lax.optimization_barrier((mine, moved_back))
        on_device = iter(memories.to_device(mine))
        filled = [
            next(on_device) if n == number else x if n is None else jnp.zeros(x.shape, x.dtype)
            for x, n in zip(leaves, leaf_groups)
        ]
        after = jax.tree.leaves(step(*jax.tree.unflatten(structure, filled)))
        stored = [*after[: len(groups)], *memories.to_host(after[len(groups) :])]
        results = [new if n in (number, None) else old for new, old, n in zip(stored, results, result_groups)]
        moved_back = [x for x, n in zip(stored[len(groups) :], leaf_groups) if n == number]
    return jax.tree.unflatten(jax.tree.structure((params, *waiting)), results)


def digest(frozen: Any) -> jax.Array | None:
    """A checksum of all values, uint32 [2], the same on every mesh; None for an empty tree."""
    leaves = jax.tree.leaves(frozen)
    if not leaves:
        return None
    total = jnp.zeros(2, jnp.uint32)
    for i, leaf in enumerate(leaves):
        bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}").astype(jnp.uint32)
        total += jnp.stack([bits.sum(dtype=jnp.uint32), (bits * bits).sum(dtype=jnp.uint32)]) * jnp.uint32(2 * i + 1)
    return total
