"""The mesh that a program is traced for (`jax.set_mesh`), and functions that each device runs on its own part."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from helios_jax.sharding import BATCH, CONTEXT, RULES


def current() -> Any:
    """The mesh, or None for one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh is None or mesh.empty or mesh.size == 1 else mesh


def size(*axes: str) -> int:
    """Devices along `axes`, all together; 1 without a mesh."""
    mesh = current()
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in axes)


def in_context() -> bool:
    """True inside `over_context`, where arrays are a device's share of the tokens."""
    mesh = current()
    return mesh is not None and CONTEXT in mesh.manual_axes


def over_context(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Makes each device run `function` on its share of tokens, split over `context` by the specs.

    The compiler still splits the other axes.
    """
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names={CONTEXT}, check_vma=False)


def each_device(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Makes each device run `function` on its part of the arrays, split by the specs.

    This takes all axes of the mesh, or within `over_context` all others. Without a mesh it is `function` itself.
    """
    mesh = current()
    if mesh is None or not (axes := set(mesh.axis_names) - set(mesh.manual_axes)):
        return function
    alone = tuple(axis for axis in mesh.axis_names if axis in axes and mesh.shape[axis] == 1)
    in_specs = jax.tree.map(lambda spec: _split_too(spec, alone), in_specs)
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=axes, check_vma=False)


def _split_too(spec: PartitionSpec, alone: tuple[str, ...]) -> PartitionSpec:
    """`spec`, with the axes `alone`, of one device each, added to those that split the first dimension.

    A gradient is summed over the axes that do not split its input. Libtpu keeps such sums, also over one device, and
    does not fuse across them.
    """
    first, *rest = map(_axes, tuple(spec) or (None,))
    used = {*first, *(axis for part in rest for axis in part)}
    first = (*first, *(axis for axis in alone if axis not in used))
    return PartitionSpec(first or None, *(part or None for part in rest))


def _axes(part: Any) -> tuple[str, ...]:
    """The axes that split a dimension: none, one, or several."""
    return () if part is None else (part,) if isinstance(part, str) else tuple(part)


def heads_split(samples: int, heads: int) -> PartitionSpec:
    """The split of [b, n, heads, head_dim] by samples and heads, each where its axes divide it."""
    by_samples = BATCH if samples % size(*BATCH) == 0 else None
    return PartitionSpec(by_samples, None, RULES["heads"] if heads % size(RULES["heads"]) == 0 else None)
