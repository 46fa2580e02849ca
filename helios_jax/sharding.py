"""The mesh and the one table of rules that lays parameters, optimiser state and batches over it.

Parameters name their dimensions (`axes` of an `nnx.Param`); `RULES` says which mesh axis each name is split over. A
dimension that its mesh axis does not divide stays whole, so the same code runs on one device, eight and a pod.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from helios_jax.config import require

Tree = TypeVar("Tree")
AnyMesh = Mesh | AbstractMesh

AXES = ("data", "fsdp", "tensor", "context")

# Logical axis of a parameter -> mesh axis. Attention and the feed-forward split over `tensor` between their two matrix
# products, the residual stream and the rank of adapters over `fsdp`. If two dimensions of an array map to the same mesh
# axis, the first is split. Axes that are not listed (embed_out, channels, layers, None) are not split.
RULES = {"vocab": "tensor", "heads": "tensor", "mlp": "tensor", "embed": "fsdp", "rank": "fsdp"}

BATCH = ("data", "fsdp")  # samples are split over both
CONTEXT = "context"  # splits tokens within the transformer
ContextAttention = Literal["ulysses", "ring"]


@dataclass
class MeshConfig:
    """Devices along each mesh axis; the one axis that is null takes the devices the others leave."""

    data: int | None = None
    fsdp: int | None = 1
    tensor: int | None = 1
    context: int | None = 1
    context_attention: ContextAttention = "ulysses"  # how tokens on `context` attend to one another
    slices: int | None = None  # groups of devices that a slow network connects, which split `data`; null: as they are
    processes: int | None = 1  # one per host, each runs the same command; null: as many as TPU pod or Slurm say

    def __post_init__(self):
        sizes = {name: getattr(self, name) for name in AXES}
        require(
            self.processes is None or self.processes > 0,
            f"processes must be at least 1, or null for as many as the cluster says, got {self.processes}",
        )
        require(self.slices is None or self.slices > 0, f"slices must be at least 1, or null, got {self.slices}")
        for name, size in sizes.items():
            require(size is None or size > 0, f"{name} must be at least 1, or null for the rest, got {size}")
        rest = [name for name, size in sizes.items() if size is None]
        require(len(rest) < 2, f"{(rest or [''])[-1]} cannot be null too: only one axis can take the rest, here {rest}")


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The (data, fsdp, tensor, context) mesh over `devices` (default: all), as `lay_out` orders them."""
    return Mesh(lay_out(config, devices or jax.devices()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def lay_out(config: MeshConfig, devices: Sequence[Any]) -> np.ndarray:
    """The devices as an array [data, fsdp, tensor, context]; a null size takes the devices left over.

    Several slices of TPUs, which a slow network joins, each take a part of the `data` axis. On the grid of a TPU pod an
    axis takes whole sides where its size is a product of some, and a part of a side elsewhere. Raises ValueError when
    the sizes do not multiply to the number of devices.
    """
    devices = list(devices)
    sizes = {name: getattr(config, name) for name in AXES}
    fixed = int(np.prod([size for size in sizes.values() if size is not None]))
    shape = tuple(len(devices) // fixed if size is None else size for size in sizes.values())
    if int(np.prod(shape)) != len(devices):
        asked = ", ".join(f"{name}={'null' if size is None else size}" for name, size in sizes.items())
        raise ValueError(f"mesh {asked} does not fit {len(devices)} devices; change a size or set one to null")
    (data, *others), (slices, by_host) = shape, _slices(config.slices, shape[0], devices)
    if data % slices:
        raise ValueError(f"mesh: data={data} must be a multiple of the {slices} slices that split it, see mesh.slices")
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(
        (data // slices, *others),
        (slices, 1, 1, 1),
        devices,
        process_is_granule=by_host,
        allow_split_physical_axes=True,
    )


def _slices(asked: int | None, data: int, devices: Sequence[Any]) -> tuple[int, bool]:
    """(number of slices, True where each is a host); raises ValueError for a number that the devices do not have."""
    own, hosts = (len({getattr(device, name, 0) for device in devices}) for name in ("slice_index", "process_index"))
    tpu = devices[0].platform == "tpu"
    # GPUs of several hosts or racks reach one another, if slowly, so `data` need not be a multiple of their number.
    if asked == own or (asked is None and (tpu or data % own == 0)):
        return own, False
    if not tpu and asked in (None, 1):
        return 1, False
    if asked == hosts:
        return hosts, True
    raise ValueError(
        f"mesh.slices={asked}, but the devices are {own} slices of {hosts} hosts: give one of these, or null"
    )


def spec(axes: Sequence[str | None], shape: Sequence[int], mesh: AnyMesh) -> PartitionSpec:
    """The split of an array of `shape` whose last dimensions are `axes`; leading ones (stacked layers) stay whole."""
    names = (None,) * (len(shape) - len(axes)) + tuple(axes)
    split: list[str | None] = []
    for name, size in zip(names, shape):
        axis = RULES.get(name) if name else None
        # A vector is small: splitting it over fsdp would save nothing and cost a collective at every use.
        whole = axis is None or axis in split or size % mesh.shape[axis] or (axis == "fsdp" and len(axes) == 1)
        split.append(None if whole else axis)
    return PartitionSpec(*split)


def shardings(tree: Tree, mesh: AnyMesh) -> Tree:
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
    """The tree with every array gathered on this host; all hosts must call it."""
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), tree)


def batch_sharding(mesh: AnyMesh) -> NamedSharding:
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
    """Global arrays on the mesh for a batch of `batch_size` samples, from the rows of this host (`batch_rows`)."""
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
