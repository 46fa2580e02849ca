"""safetensors files, tensor by tensor: reads rows of a tensor, and writes a file without holding it in memory.

The safetensors library validates what is read. It maps a file into memory, and every page that was touched counts as
resident until the file is closed. Plain reads need half the memory and are two to four times as fast.
"""

import json
import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from helios_jax.locations import is_remote
from helios_jax.messages import one_line
from helios_jax.pretrained.errors import CheckpointError
from helios_jax.pretrained.folder import weight_files

DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
PIECE = 64 * 2**20  # bytes that are read before they are cast
MOST_HEADER = 100_000_000  # bytes; the library takes no larger one


# Bit patterns of +infinity in floating dtypes (of NaN in dtypes without infinity). Those of NaNs are greater.
INFINITY = {
    np.dtype(dtype): bits
    for dtype, bits in (
        (np.float64, 0x7FF0 << 48),
        (np.float32, 0x7F80 << 16),
        (np.float16, 0x7C00),
        (jnp.bfloat16, 0x7F80),
        (jnp.float8_e4m3fn, 0x7F),
        (jnp.float8_e5m2, 0x7C),
    )
}


def check_finite(values: np.ndarray, source: str, name: str) -> None:
    """Raises `CheckpointError` if `values`, the tensor `name`, hold NaN or infinity.

    Two maxima of the values' bits suffice: as signed integers they find positive ones, as unsigned integers negative
    ones. That takes no memory, and a tenth of the time of `np.isfinite` in bfloat16. Integers are finite.
    """
    bits = INFINITY.get(values.dtype)
    if bits is None or not values.size:
        return
    size = values.dtype.itemsize
    signed = values.view(f"i{size}").max()
    if signed >= bits or values.view(f"u{size}").max() >= bits | 1 << (8 * size - 1):
        raise CheckpointError(
            f"{source}: {name} holds NaN or infinity (as {values.dtype}): the file is damaged or its training diverged;"
            " download it again, or take another checkpoint"
        )


@dataclass(frozen=True)
class Tensor:
    """The tensor `name` of a file, from byte `offset` on."""

    name: str
    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, rows: slice = slice(None), dtype: Any = None) -> np.ndarray:
        """The tensor's rows (a slice of the first dimension) as a new array, cast piece by piece to `dtype`.

        Raises CheckpointError for NaN or infinity, also where a finite value has overflowed `dtype`.
        """
        dtype = self.dtype if dtype is None else np.dtype(dtype)
        start, stop, _ = rows.indices(self.shape[0]) if self.shape else (0, 1, 1)
        inner = int(np.prod(self.shape[1:], dtype=np.int64))
        values = np.empty(max(stop - start, 0) * inner, dtype)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset + start * inner * self.dtype.itemsize)
            if dtype == self.dtype:
                self._fill(file, values)
                check_finite(values, str(self.path), self.name)
            else:
                step = PIECE // self.dtype.itemsize
                piece = np.empty(min(step, values.size), self.dtype)
                for first in range(0, values.size, step):
                    part = values[first : first + step]
                    self._fill(file, piece[: part.size])
                    part[:] = piece[: part.size]
                    check_finite(part, str(self.path), self.name)
        return values.reshape((stop - start, *self.shape[1:]) if self.shape else ())

    def _fill(self, file: Any, values: np.ndarray) -> None:
        left = values.view(np.uint8).data if values.size else b""
        while left:  # a read of more than 2 GB returns in parts
            if not (n := file.readinto(left[:PIECE])):
                raise CheckpointError(f"{self.path} ended while it was read: something is writing to it")
            left = left[n:]


def read_header(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file and its metadata; nothing but the header is read.

    Raises:
        CheckpointError: the file is missing, cut off, or no safetensors file.
    """
    try:
        length = path.stat().st_size
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            text = file.read(min(size, MOST_HEADER))
        _check(path, size, text, length)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: download the folder again") from None
    except (SafetensorError, ValueError, OSError) as error:
        reason = one_line(error)
        raise CheckpointError(f"{path} is not a whole safetensors file ({reason}): download it again") from None
    header = json.loads(text)
    metadata = header.pop("__metadata__", None) or {}
    unknown = {value["dtype"] for value in header.values()} - DTYPES.keys()
    if unknown:
        raise CheckpointError(
            f"{path} holds tensors of dtype {', '.join(sorted(unknown))}, which cannot be read here:"
            " take the release in bfloat16"
        )
    tensors = {
        key: Tensor(
            key, path, 8 + size + value["data_offsets"][0], tuple(value["shape"]), np.dtype(DTYPES[value["dtype"]])
        )
        for key, value in header.items()
    }
    return tensors, metadata


def _check(path: Path, size: int, text: bytes, length: int) -> None:
    """Has the safetensors library check a header, and that the file is as long as it says; raises its errors.

    The library opens local files alone. In place of a bucket's it gets one with the same header and a hole after it.
    """
    if not is_remote(path):
        with safe_open(path, "numpy"):
            return
    if len(text) != size:
        raise ValueError(f"its header is {size} bytes, the file {length}")
    with tempfile.NamedTemporaryFile(prefix="helios-") as file:
        file.write(size.to_bytes(8, "little") + text)
        file.truncate(length)
        file.flush()
        with safe_open(file.name, "numpy"):
            return


def read_headers(folder: Path) -> dict[str, Tensor]:
    """Maps each key of a component's weight files to its tensor; reads headers only."""
    found: dict[str, Tensor] = {}
    for path in weight_files(folder):
        for key, tensor in read_header(path)[0].items():
            if key in found:
                raise CheckpointError(f"{path} repeats {key}, which {found[key].path} holds already")
            found[key] = tensor
    return found


Spec = tuple[Any, tuple[int, ...]]  # the dtype and shape of a tensor to be written


def order(tensors: Mapping[str, Spec]) -> list[str]:
    """The order of values in a file: wide dtypes first, as in the library, so that every tensor is aligned."""
    return sorted(tensors, key=lambda key: (-np.dtype(tensors[key][0]).itemsize, key))


def write_header(file: Any, tensors: Mapping[str, Spec], metadata: Mapping[str, str]) -> int:
    """Writes the header of a safetensors file; returns the number of bytes of values after it."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for key in order(tensors):
        dtype, shape = np.dtype(tensors[key][0]), tensors[key][1]
        end = offset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        header[key] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    return offset


def write(
    path: Path, tensors: Mapping[str, Spec], value: Callable[[str], np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file of `tensors`; `value(key)` gives each tensor when its turn comes.

    If several hosts share the values, all must call: each calls `value`, and the first writes.
    """
    writes = jax.process_index() == 0
    with path.open("wb") if writes else nullcontext() as file:
        if file:
            write_header(file, tensors, metadata)
        for key in order(tensors):
            array = np.asarray(value(key), order="C")
            assert (array.dtype, array.shape) == (np.dtype(tensors[key][0]), tuple(tensors[key][1])), key
            if file:
                file.write(array.reshape(-1).view(np.uint8).data)
