"""The mesh and the one table of rules that lays parameters, optimiser state and batches over it.

Parameters name their dimensions (`axes` of an `nnx.Param`); `RULES` says which mesh axis each name is split over. A
dimension that its mesh axis does not divide stays whole, so the same code runs on one device, eight and a pod.
"""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

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
# products, the residual stream and the rank of adapters over `fsdp`, the first of them where an array has both; axes
# that are not listed (embed_out, channels, layers, None) are not split.
RULES = {"vocab": "tensor", "heads": "tensor", "mlp": "tensor", "embed": "fsdp", "rank": "fsdp"}

BATCH = ("data", "fsdp")  # samples are split over both


@dataclass
class MeshConfig:
    """Devices along each mesh axis; the one axis that is null takes the devices the others leave."""

    data: int | None = None
    fsdp: int | None = 1
    tensor: int | None = 1
    context: int | None = 1
    processes: int = 1  # one per host; more than one: each host runs the same command, see `join_hosts`

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        require(sizes.pop("processes") > 0, f"processes must be at least 1, got {self.processes}")
        for name, size in sizes.items():
            require(size is None or size > 0, f"{name} must be at least 1, or null for the rest, got {size}")
        rest = [name for name, size in sizes.items() if size is None]
        require(len(rest) < 2, f"{(rest or [''])[-1]} cannot be null too: only one axis can take the rest, here {rest}")


def join_hosts(processes: int) -> None:
    """Connect this process to the others of a run of `processes`; to be called before anything asks for devices.

    TPU pods and Slurm say where the others are; elsewhere JAX_COORDINATOR_ADDRESS (host:port of the first process) and
    JAX_PROCESS_ID (0 and up) do. Raises ValueError when they cannot be found.
    """
    if processes == 1 or jax.distributed.is_initialized():
        return
    number = os.environ.get("JAX_PROCESS_ID")
    try:
        jax.distributed.initialize(num_processes=processes, process_id=None if number is None else int(number))
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"mesh.processes: cannot join {processes} processes: {reason}") from None


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The (data, fsdp, tensor, context) mesh over `devices` (default: all); a null size takes the devices left over.

    Several slices of TPUs, which a slow network joins, each take a part of the `data` axis. Raises ValueError when the
    sizes do not multiply to the number of devices, or fit no grid of a TPU pod's links.
    """
    devices = list(devices or jax.devices())
    sizes = {name: getattr(config, name) for name in AXES}
    fixed = int(np.prod([size for size in sizes.values() if size is not None]))
    shape = tuple(len(devices) // fixed if size is None else size for size in sizes.values())
    if int(np.prod(shape)) != len(devices):
        asked = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(f"mesh {asked} does not fit {len(devices)} devices; change a size or set one to null")
    tpu = devices[0].platform == "tpu"  # GPUs of several hosts have several numbers too
    slices = len({getattr(device, "slice_index", None) for device in devices}) if tpu else 1
    asked = ", ".join(f"{name}={size}" for name, size in zip(AXES, shape))
    types = (AxisType.Auto,) * len(AXES)
    if shape[0] % slices:
        raise ValueError(f"mesh {asked} cannot be laid over {slices} slices: data must be a multiple of {slices}")
    try:
        if slices == 1:
            return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
        within, between = (shape[0] // slices, *shape[1:]), (slices, 1, 1, 1)
        return Mesh(mesh_utils.create_hybrid_device_mesh(within, between, devices), AXES, axis_types=types)
    except NotImplementedError:  # of a TPU pod, whose links are a grid
        sides = "x".join(str(len(set(places))) for places in zip(*(device.coords for device in devices)))
        raise ValueError(
            f"mesh {asked} cannot be laid over this pod of {sides}: each size must be a product of some of its sides, "
            "each side used once"
        ) from None


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
    """The tree with every array in this host's reach; all hosts must call it."""
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


def check_hosts(mesh: Mesh) -> None:
    """Raises ValueError unless each host's devices take exactly its own part of a batch.

    Each host reads its own samples: devices of two hosts that take the same samples would be given others, and a host
    with more shards of the batch than another would have too few.
    """
    shards = mesh.devices.reshape(mesh.shape["data"] * mesh.shape["fsdp"], -1)
    hosts = sorted({device.process_index for device in mesh.devices.flat})
    owners = [{device.process_index for device in shard} for shard in shards]
    counts = {host: sum(owner == {host} for owner in owners) for host in hosts}
    share = len(shards) // len(hosts)
    if set(counts.values()) != {share} or share * len(hosts) != len(shards):
        each = shards.size // len(hosts)
        raise ValueError(
            f"mesh: tensor={mesh.shape['tensor']}, context={mesh.shape['context']} would split the samples of one host "
            f"over several: each of {len(hosts)} hosts must have whole samples, as many as any other; give tensor x "
            f"context a divisor of a host's {each} devices, and data x fsdp a multiple of {len(hosts)}"
        )


def put_batch(batch: Tree, mesh: Mesh) -> Tree:
    """This host's part of a batch (numpy arrays) as global arrays on the mesh."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)
