"""The map from tensors of files to parameters, and the layouts of their values.

A parameter's path, joined with dots, is its key in the file. A class whose attributes have other names lists them in
`FILE_NAMES`, pairs of (our path segments, the file's). `FLOAT32` holds the path segments that stay float32 in every
precision, as diffusers' `_keep_in_fp32_modules` does. `TIED` maps a key that files may repeat to the key it repeats.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from helios_jax.models.layers import Layout
from helios_jax.pretrained.errors import CheckpointError

Path = tuple[Any, ...]
LAYER = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class Entry:
    """Destination of one tensor of a file: a parameter's `path`, the `layer` if stacked, its `shape` in the file."""

    path: Path
    layer: int | None
    shape: tuple[int, ...]
    layout: Layout


def file_shape(shape: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
    """The shape, in a file, of a parameter of `shape`."""
    if layout == "same":
        return shape
    if layout == "linear":
        return shape[::-1]
    if layout == "conv":
        return (shape[-1], shape[-2], *shape[:-2])
    assert isinstance(layout, tuple)
    return layout


def to_file(value: Any, layout: Layout) -> Any:
    """A parameter's values (numpy or jax) in the file's layout."""
    if layout == "linear":
        return value.T
    if layout == "conv":
        return value.transpose(value.ndim - 1, value.ndim - 2, *range(value.ndim - 2))
    return value if layout == "same" else value.reshape(layout)


def from_file(value: Any, layout: Layout, shape: tuple[int, ...]) -> Any:
    """The inverse of `to_file`; `shape` is the parameter's."""
    if layout == "linear":
        return value.T
    if layout == "conv":
        return value.transpose(*range(2, value.ndim), 1, 0)
    return value if layout == "same" else value.reshape(shape)


def file_key(path: Path, names: tuple[tuple[str, str], ...]) -> str:
    """The file key of the parameter at `path`, by the `FILE_NAMES` of its model."""
    key = ".".join(str(p) for p in path)
    for ours, theirs in names:
        key = re.sub(rf"(?<![^.]){re.escape(ours)}(?![^.])", theirs, key)
    return key


def file_entries(model: nnx.Module) -> dict[str, Entry]:
    """Maps each safetensors key of `model` (concrete or abstract) to the parameter it fills.

    A parameter with one dimension more than it has axis names is stacked over layers. It has one key per layer, with
    the layer's number after the stack's name.
    """
    names = getattr(type(model), "FILE_NAMES", ())
    entries = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        axes, layout, shape = variable.axes, variable.layout, variable.shape
        if len(shape) == len(axes):
            entries[file_key(path, names)] = Entry(path, None, file_shape(shape, layout), layout)
            continue
        for layer in range(shape[0]):
            key = file_key((path[0], layer, *path[1:]), names)
            entries[key] = Entry(path, layer, file_shape(shape[1:], layout), layout)
    return entries


def dtype_of(model: nnx.Module, path: Path, dtype: Any) -> Any:
    """The dtype of the parameter at `path` when the model runs in `dtype` (None: the file's dtype)."""
    if dtype is None:
        return None
    islands = getattr(type(model), "FLOAT32", ())
    return jnp.dtype(jnp.float32 if any(str(p) in islands for p in path) else dtype)


def used_keys(model: nnx.Module, present: Iterable[str]) -> dict[str, str]:
    """Maps our key to the file's name. A tied key counts once, whichever of its names the file holds."""
    tied = getattr(type(model), "TIED", {})
    present = list(present)
    return {tied.get(name, name): name for name in present if name not in tied or tied[name] not in present}


def check_shapes(
    entries: Mapping[str, Entry], found: Mapping[str, tuple[int, ...]], source: str, sizes: str = "the model"
) -> None:
    """Raises `CheckpointError` unless `found` holds exactly the tensors of `entries`, with their shapes.

    `sizes` is where the sizes of `entries` come from. It is blamed for other shapes and for another number of layers,
    but not for tensors that no size would explain.
    """
    missing, extra = entries.keys() - found.keys(), found.keys() - entries.keys()
    wrong = [
        f"{k} is {list(found[k])}, not {list(entries[k].shape)}"
        for k in entries.keys() & found.keys()
        if tuple(found[k]) != entries[k].shape
    ]
    problems = []
    if missing:
        problems.append(f"lacks {some(missing)}")
    if extra:
        problems.append(f"holds {some(extra)}, unknown to this model")
    if wrong:
        problems.append(some(wrong))
    if problems:
        layers = {LAYER.sub(".", key) for key in entries.keys() & found.keys()}
        other_sizes = wrong or all(LAYER.sub(".", key) in layers for key in missing | extra)
        fault = f"does not fit {sizes}" if other_sizes else "has not the tensors of this model"
        raise CheckpointError(f"{source} {fault}: {'; '.join(problems)}")


def some(names: Iterable[str]) -> str:
    """The first few of `names`, and the number of the others."""
    names = sorted(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def count(model: nnx.Module) -> int:
    """The number of parameters of `model`, concrete or abstract."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
