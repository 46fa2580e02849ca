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
from helios_jax.runtime.offload import default_device

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
        shardings: a tree like `model` (`helios_jax.sharding.shardings`); this host then reads the rows that its
            devices need, and all hosts must call. None: the default device.
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
            for entry, tensor in tensors:
                job = partial(_put, tensor, entry, shape[1:], kind, _of_layer(sharding), device)
                jobs.append((_position(tensor), size // shape[0], partial(_named, path, entry.layer, job)))
        else:
            job = partial(_put_small_stack, tensors, shape, kind, sharding, device)
            if not layered:
                entry, tensor = tensors[0]
                job = partial(_put, tensor, entry, shape, kind, sharding, device)
            jobs.append((_position(tensors[0][1]), size, partial(_named, path, None, job)))
    jobs.sort(key=lambda job: job[0])
    return _in_order((size, job) for _, size, job in jobs)


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
    """A tensor of a file as a parameter of `shape`, on its devices.

    Only the rows that this host's devices need are read, if the file's first dimension is one of the parameter's
    (`axis`). The tensor is transposed as it is copied to the device: XLA copies a strided array about as fast as a
    contiguous one, numpy takes three times as long, and a program on the device must be compiled for every shape.
    """
    axis = None if not shape or isinstance(entry.layout, tuple) else 0 if entry.layout == "same" else -1
    rows, kept = slice(None), shape
    if sharding is not None and axis is not None:
        needed = [i[axis].indices(shape[axis]) for i in sharding.addressable_devices_indices_map(shape).values()]
        rows = slice(min(start for start, _, _ in needed), max(stop for _, stop, _ in needed))
        kept = tuple(rows.stop - rows.start if i == axis % len(shape) else n for i, n in enumerate(shape))
    values = from_file(tensor.read(rows, dtype), entry.layout, kept)
    return place(values, shape, sharding, device, axis, rows.start or 0)


def _put_small_stack(
    tensors: list[tuple[Entry, Stored]], shape: tuple[int, ...], dtype: Any, sharding: Any, device: Any
) -> jax.Array:
    """All layers of a small parameter as one array."""
    values = np.empty(shape, dtype)
    for entry, tensor in tensors:
        values[entry.layer] = from_file(tensor.read(dtype=dtype), entry.layout, shape[1:])
    return place(values, shape, sharding, device)


def place(
    values: np.ndarray,
    shape: tuple[int, ...],
    sharding: Any,
    device: Any = None,
    axis: int | None = None,
    start: int = 0,
) -> jax.Array:
    """`values` on their devices. Along `axis` they are the part of an array of `shape` that begins at `start`.

    Waits until the copy is done, so that the caller can free the values.
    """
    if sharding is None:
        with jax.default_device(device):
            return jax.block_until_ready(jax.device_put(values))

    def piece(index: Any) -> np.ndarray:
        part = list(index)
        if axis is not None:
            first, stop, _ = index[axis].indices(shape[axis])
            part[axis] = slice(first - start, stop - start)
        return values[tuple(part)]

    return jax.block_until_ready(jax.make_array_from_callback(shape, sharding, piece))


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
