"""Weights into a model: each tensor goes from its file to its devices, and the host frees it.

Every key in a file is used exactly once and every parameter is filled exactly once, or `CheckpointError` names them.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from helios_jax.pretrained import layout
from helios_jax.pretrained.files import Tensor, check_finite, read_headers
from helios_jax.pretrained.kinds import check_dtypes, check_names
from helios_jax.pretrained.layout import Entry, check_shapes, dtype_of, file_entries, from_file, used_keys
from helios_jax.runtime.offload import HOST, default_device

Model = TypeVar("Model", bound=nnx.Module)
Result = TypeVar("Result")
Placed = tuple[layout.Path, int | None, jax.Array]  # a parameter, or a layer of a stacked one, on its devices

READERS = 4  # tensors that are read and placed at a time
IN_FLIGHT = 2**29  # bytes on the host at a time, unless one tensor is larger
# Smaller stacked parameters (bytes) are stacked on the host: compiling a program for their shape takes longer.
SMALL = 2**20


class Stored(Protocol):
    """A tensor in a file or in memory."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    def read(self, rows: slice = slice(None), dtype: Any = None) -> np.ndarray: ...


class InMemory:
    """An array in memory with the interface of a stored tensor."""

    def __init__(self, values: Any, name: str = "an array", source: str = "the mapping"):
        self.values, self.shape, self.dtype = values, tuple(values.shape), np.dtype(values.dtype)
        self.name, self.source = name, source

    def read(self, rows: slice = slice(None), dtype: Any = None) -> np.ndarray:
        # A copy: on a CPU the parameter could share memory with these values, which belong to the caller.
        values = np.array(np.asarray(self.values)[rows] if self.shape else self.values, dtype or self.dtype, order="C")
        check_finite(values, self.source, self.name)
        return values


def load_model(
    model: Model, folder: Path, *, dtype: Any = None, shardings: Any = None, sizes: str = "the model"
) -> Model:
    """The (abstract) `model` with the weights in `folder`, read tensor by tensor to where they stay.

    Args:
        model: shapes are enough; no value of it is read.
        folder: a component of a diffusers folder: safetensors, one file or shards with an index.
        dtype: what the parameters become, but for the class's `FLOAT32` islands; None keeps what the files have, and
            "model" gives each the dtype that it has in `model`.
        shardings: a tree like `model` (`helios_jax.sharding.shardings`). All hosts must call; of each large tensor a
            host reads its share of the rows, and the devices exchange what they need. None: the default device.
        sizes: where the model's sizes come from, for the error of files that do not fit them.

    Raises:
        CheckpointError: the files and the model do not fit, or a file is broken, or a weight is NaN or infinite.
    """
    stored = read_headers(folder)
    return _assemble(model, stream(model, stored, dtype=dtype, shardings=shardings, source=str(folder), sizes=sizes))


def from_arrays(model: Model, arrays: Mapping[str, Any], *, dtype: Any = None) -> Model:
    """`model` (concrete or abstract) filled from arrays under their file keys and in their file layout."""
    source = "the mapping"
    stored = {key: InMemory(values, key, source) for key, values in arrays.items()}
    return _assemble(model, stream(model, stored, dtype=dtype, source=source))


def check_weights(model: nnx.Module, folder: Path) -> None:
    """Raises `CheckpointError` unless the files in `folder` fit the (abstract) `model` of its config.json.

    Reads headers only.
    """
    _keys(model, read_headers(folder), str(folder), "its config.json")


def _keys(model: nnx.Module, stored: Mapping[str, Stored], source: str, sizes: str = "the model") -> dict[str, str]:
    """Maps each of the model's keys to its name in `stored`, after checking that they fit."""
    check_dtypes({key: tensor.dtype for key, tensor in stored.items()}, source)
    check_names(stored, source)
    keys = used_keys(model, stored)
    check_shapes(file_entries(model), {key: stored[name].shape for key, name in keys.items()}, source, sizes)
    return keys


def stream(
    model: nnx.Module,
    stored: Mapping[str, Stored],
    *,
    dtype: Any = None,
    shardings: Any = None,
    source: str,
    sizes: str = "the model",
) -> Iterator[Placed]:
    """(path, layer, array) of every parameter of `model` in the order of the files, already on its devices.

    The layer is None for a whole parameter; a stacked one comes layer by layer unless it is small. At most `IN_FLIGHT`
    bytes (or one tensor) are on the host at a time.
    """
    keys = _keys(model, stored, source, sizes)
    parameters = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    placed = None if shardings is None else dict(nnx.to_flat_state(nnx.state(shardings, nnx.Param)))
    groups: dict[layout.Path, list[tuple[Entry, Stored]]] = {}
    for key, entry in file_entries(model).items():
        groups.setdefault(entry.path, []).append((entry, stored[keys[key]]))

    jobs: list[tuple[tuple[str, int], int, Callable[[], Placed]]] = []
    targets: dict[layout.Path, Any] = {}
    # Worker threads do not see the caller's `jax.default_device`.
    device = default_device()
    for path, tensors in groups.items():
        shape, layered = parameters[path].shape, tensors[0][0].layer is not None
        found = {jax.dtypes.canonicalize_dtype(tensor.dtype) for _, tensor in tensors}
        as_model = isinstance(dtype, str) and dtype == "model"
        kind = parameters[path].dtype if as_model else dtype_of(model, path, dtype) or jnp.result_type(*found)
        sharding = None if placed is None else placed[path].get_value()
        size = int(np.prod(shape)) * kind.itemsize
        if layered and size > SMALL:
            targets[path] = _of_layer(sharding)
            for entry, tensor in tensors:
                job = partial(_put, tensor, entry, shape[1:], kind, targets[path], device)
                jobs.append((_position(tensor), size // shape[0], partial(_named, path, entry.layer, job)))
        else:
            targets[path] = sharding
            job = partial(_put_small_stack, tensors, shape, kind, sharding, device)
            if not layered:
                entry, tensor = tensors[0]
                job = partial(_put, tensor, entry, shape, kind, sharding, device)
            jobs.append((_position(tensors[0][1]), size, partial(_named, path, None, job)))
    jobs.sort(key=lambda job: job[0])
    for path, layer, array in _in_order((size, job) for _, size, job in jobs):
        target = targets[path]
        if not (array.is_fully_addressable or array.sharding.is_equivalent_to(target, array.ndim)):
            # Here, since all hosts must exchange rows in one order; and one by one, for want of threads on CPUs.
            array = jax.block_until_ready(_exchange(array, target))
        yield path, layer, array


def _position(tensor: Stored) -> tuple[str, int]:
    """A tensor's position in its file: disks and networks read fastest in this order."""
    return (str(tensor.path), tensor.offset) if isinstance(tensor, Tensor) else ("", 0)


def _named(path: layout.Path, layer: int | None, job: Callable[[], jax.Array]) -> Placed:
    return path, layer, job()


def _in_order(jobs: Iterable[tuple[int, Callable[[], Result]]]) -> Iterator[Result]:
    """The results of jobs (bytes, call) in order, while threads run the next jobs."""
    running: deque = deque()
    with ThreadPoolExecutor(READERS) as pool:
        for size, job in jobs:
            while running and (len(running) == READERS or sum(s for s, _ in running) + size > IN_FLIGHT):
                yield running.popleft()[1].result()
            running.append((size, pool.submit(job)))
        while running:
            yield running.popleft()[1].result()


def _of_layer(sharding: Any) -> Any:
    """The sharding of one layer of a stacked parameter, whose layers are not split."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    assert not sharding.spec or sharding.spec[0] is None, f"layers are split: {sharding.spec}"
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


def _put(tensor: Stored, entry: Entry, shape: tuple[int, ...], dtype: Any, sharding: Any, device: Any) -> jax.Array:
    """A tensor of a file as a parameter of `shape`, on its devices, or its rows on those of several hosts.

    Only the rows that this host's devices get are read, if the file's first dimension is one of the parameter's. The
    tensor is transposed as it is copied to the device: XLA copies a strided array about as fast as a contiguous one,
    numpy takes three times as long, and a program on the device must be compiled for every shape.
    """
    if sharding is None or not shape or isinstance(entry.layout, tuple):
        return place(from_file(tensor.read(dtype=dtype), entry.layout, shape), sharding, device)
    axis = 0 if entry.layout == "same" else len(shape) - 1
    sharding = _by_rows(sharding, shape, axis)
    parts = {}
    placed = sharding.addressable_devices_indices_map(shape).values()
    for rows in _runs((index[axis] for index in placed), shape[axis]):
        kept = (*shape[:axis], rows.stop - rows.start, *shape[axis + 1 :])
        parts[rows.start] = from_file(tensor.read(rows, dtype), entry.layout, kept)

    def piece(index: Any) -> np.ndarray:
        first, stop, _ = index[axis].indices(shape[axis])
        start = max(start for start in parts if start <= first)
        return parts[start][(*index[:axis], slice(first - start, stop - start), *index[axis + 1 :])]

    return jax.block_until_ready(jax.make_array_from_callback(shape, sharding, piece))


def _by_rows(sharding: NamedSharding, shape: tuple[int, ...], axis: int) -> NamedSharding:
    """The sharding in which an array is read: on several hosts split along `axis` alone, over all devices.

    A host whose devices have a part of each row of a file would read nearly all of it, and all hosts nearly all.
    """
    if sharding.is_fully_addressable or sharding.memory_kind == HOST or shape[axis] % sharding.num_devices:
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*[None] * axis, sharding.mesh.axis_names))


@partial(jax.jit, static_argnums=1)
def _exchange(array: jax.Array, sharding: NamedSharding) -> jax.Array:
    """An array that was read by its rows, as `sharding` says."""
    whole = jax.lax.with_sharding_constraint(array, NamedSharding(sharding.mesh, PartitionSpec()))
    return jax.lax.with_sharding_constraint(whole, sharding)


def _runs(slices: Iterable[slice], size: int) -> list[slice]:
    """The rows of a dimension of `size` that are in any of the slices, as few slices that do not touch."""
    runs: list[slice] = []
    for start, stop in sorted({part.indices(size)[:2] for part in slices}):
        if runs and start <= runs[-1].stop:
            runs[-1] = slice(runs[-1].start, max(stop, runs[-1].stop))
        else:
            runs.append(slice(start, stop))
    return runs


def _put_small_stack(
    tensors: list[tuple[Entry, Stored]], shape: tuple[int, ...], dtype: Any, sharding: Any, device: Any
) -> jax.Array:
    """All layers of a small parameter as one array."""
    values = np.empty(shape, dtype)
    for entry, tensor in tensors:
        values[entry.layer] = from_file(tensor.read(dtype=dtype), entry.layout, shape[1:])
    return place(values, sharding, device)


def place(values: np.ndarray, sharding: Any, device: Any = None) -> jax.Array:
    """`values` on their devices. Waits until the copy is done, so that the caller can free the values."""
    if sharding is None:
        with jax.default_device(device):
            return jax.block_until_ready(jax.device_put(values))
    return jax.block_until_ready(jax.make_array_from_callback(values.shape, sharding, lambda index: values[index]))


def _assemble(model: Model, arrays: Iterator[Placed]) -> Model:
    """`model` with the parameters from `stream`. A parameter that comes layer by layer is filled in place."""
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)
    flat = dict(nnx.to_flat_state(parameters))
    made: dict[layout.Path, jax.Array] = {}
    for path, layer, array in arrays:
        if layer is None:
            made[path] = array
            continue
        if path not in made:
            made[path] = _empty_stack(array, flat[path].shape[0])
        made[path] = _set_layer(made[path], array, layer)
    state = nnx.from_flat_state([(path, variable.replace(made[path])) for path, variable in flat.items()])
    return nnx.merge(graph, state, rest)


def _empty_stack(layer: jax.Array, layers: int) -> jax.Array:
    sharding = layer.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
    return jnp.zeros((layers, *layer.shape), layer.dtype, device=sharding)


@partial(jax.jit, donate_argnums=0)
def _set_layer(stack: jax.Array, layer: jax.Array, i: int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, layer, i, 0)
