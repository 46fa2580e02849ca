"""The mesh and the one table of rules that lays parameters, optimiser state and batches over it.

Parameters name their dimensions (`axes` of an `nnx.Param`); `RULES` says which mesh axis each name is split over. A
dimension that its mesh axis does not divide stays whole, so the same code runs on one device, eight and a pod.
"""

import dataclasses
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from helios_jax.config import require

Tree = TypeVar("Tree")

AXES = ("data", "fsdp", "tensor", "context")

# Logical axis of a parameter -> mesh axis. Attention and the feed-forward split over `tensor` between their two matrix
# products, the residual stream over `fsdp`; axes that are not listed (embed_out, channels, layers, None) are not split.
RULES = {"vocab": "tensor", "heads": "tensor", "mlp": "tensor", "embed": "fsdp"}

BATCH = ("data", "fsdp")  # samples are split over both


@dataclass
class MeshConfig:
    """Devices along each mesh axis; the one axis that is null takes the devices the others leave."""

    data: int | None = None
    fsdp: int | None = 1
    tensor: int | None = 1
    context: int | None = 1
    processes: int | None = 1  # one per host, each runs the same command; null: as many as TPU pod or Slurm say

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        processes = sizes.pop("processes")
        require(
            processes is None or processes > 0,
            f"processes must be at least 1, or null for as many as the cluster says, got {processes}",
        )
        for name, size in sizes.items():
            require(size is None or size > 0, f"{name} must be at least 1, or null for the rest, got {size}")
        rest = [name for name, size in sizes.items() if size is None]
        require(len(rest) < 2, f"{(rest or [''])[-1]} cannot be null too: only one axis can take the rest, here {rest}")


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The (data, fsdp, tensor, context) mesh over `devices` (default: all); a null size takes the devices left over.

    Raises ValueError when the sizes do not multiply to the number of devices, or fit no grid of a TPU pod's links.
    """
    devices = list(devices or jax.devices())
    sizes = {name: getattr(config, name) for name in AXES}
    fixed = int(np.prod([size for size in sizes.values() if size is not None]))
    shape = tuple(len(devices) // fixed if size is None else size for size in sizes.values())
    if int(np.prod(shape)) != len(devices):
        asked = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(f"mesh {asked} does not fit {len(devices)} devices; change a size or set one to null")
    try:
        return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
    except NotImplementedError:  # of a TPU pod, whose links are a grid
        asked = ", ".join(f"{name}={size}" for name, size in zip(AXES, shape))
        raise ValueError(
            f"mesh {asked} cannot be laid over this pod: each size must be a product of some of the pod's sides "
            "(of 4x4x4: 4, 16 or 64)"
        ) from None


def spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """The split of an array of `shape` whose last dimensions are `axes`; leading ones (stacked layers) stay whole."""
    names = (None,) * (len(shape) - len(axes)) + tuple(axes)
    split: list[str | None] = []
    for name, size in zip(names, shape):
        axis = RULES.get(name) if name else None
        # A vector is small: splitting it over fsdp would save nothing and cost a collective at every use.
        whole = axis is None or axis in split or size % mesh.shape[axis] or (axis == "fsdp" and len(axes) == 1)
        split.append(None if whole else axis)
    return PartitionSpec(*split)


def shardings(tree: Tree, mesh: Mesh) -> Tree:
    """A tree like `tree` (a model or whole train state, concrete or abstract) with a NamedSharding for each array.

    Leaves that are no parameter (counters, schedules' state) are replicated.
    """

    def leaf(x: Any) -> Any:
        axes = getattr(x, "axes", None) if isinstance(x, nnx.Variable) else None
        return jax.tree.map(
            lambda a: NamedSharding(mesh, spec(axes or (), a.shape, mesh) if axes else PartitionSpec()), x
        )

    return jax.tree.map(leaf, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))


def gather(tree: Tree) -> Tree:
    """The tree with every array in this host's reach; all hosts must call it."""
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Samples, the first dimension, over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def check_batch(batch_size: int, mesh: Mesh) -> None:
    """Raises ValueError unless the global batch divides over the mesh."""
    ways = int(np.prod([mesh.shape[axis] for axis in BATCH]))
    if batch_size % ways:
        raise ValueError(
            f"data.batch_size {batch_size} does not divide over data x fsdp = {ways} devices; "
            f"try {-(-batch_size // ways) * ways}, or fewer devices on those axes"
        )


def batch_rows(batch_size: int, mesh: Mesh) -> list[int]:
    """The rows of a global batch that this host's devices hold, in order.

    Hosts whose devices share samples (tensor or context axes across hosts) have the same rows.
    """
    places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return sorted({row for index in places.values() if index for row in range(*index[0].indices(batch_size))})


def put_batch(batch: Tree, batch_size: int, mesh: Mesh) -> Tree:
    """Global arrays on the mesh, of a batch of `batch_size` samples, from this host's rows (`batch_rows`) of it."""
    sharding, rows = batch_sharding(mesh), batch_rows(batch_size, mesh)

    def put(local: Any) -> jax.Array:
        values = np.asarray(local)
        assert len(values) == len(rows), (len(values), rows)

        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_size) if index else (0, batch_size, 1)
            first = bisect_left(rows, start)
            return values[first : first + stop - start]

        return jax.make_array_from_callback((batch_size, *values.shape[1:]), sharding, shard, dtype=values.dtype)

    return jax.tree.map(put, batch)
