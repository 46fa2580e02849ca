"""Checks of a run's records before anything is built: fields, shapes, dtypes, and the embeddings beside them."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from helios_jax.config import ConfigError
from helios_jax.data.records import PLAN, Example, RecordError, Source, open_source
from helios_jax.locations import location
from helios_jax.training.run_config import DataConfig


class Axis(NamedTuple):
    """A dimension of a field: its name, and the size that the run asks for (None: any) by the setting `asked_by`."""

    name: str
    size: int | None = None
    asked_by: str = ""
    or_more: bool = False


class Field(NamedTuple):
    """A field of a record: its dimensions, and the kind of its values, `np.floating` or `np.integer`; None: text."""

    axes: tuple[Axis, ...] = ()
    kind: Any = np.floating


TEXT = Field(kind=None)


def open_records(data: DataConfig, make: str, split: str = "train") -> Source:
    """The records of a run, without the damaged ones in `data.leave_out`; `make` is the command that writes the folder.

    Raises ConfigError, in one line, for a folder that is missing or damaged, or that holds no records.
    """
    try:
        left_out = data.leave_out if split == "train" else ()
        source = open_source(data.folder, split, make=make, leave_out=left_out, cache=data.cache)
    except (OSError, ValueError) as error:
        key = "data." if str(error).startswith("leave_out:") else "data.folder: "
        raise ConfigError(f"{key}{error}") from None
    if not len(source):
        raise ConfigError(f"data.folder: {data.folder} holds no records; make it with `{make}`")
    return source


def one_of_each(source: Source) -> list[Example]:
    """The first record of each size. Raises ConfigError, in one line, for one that is damaged."""
    try:
        return source.of_each_bucket()
    except RecordError as error:
        raise ConfigError(f"data.folder: {error}") from None


def check_record(example: Example, fields: Mapping[str, Field], data: DataConfig, make: str) -> None:
    """Raises ConfigError, in one line, for a record that lacks one of `fields`, or has it in other sizes or types."""
    folder = f"data.folder: {data.folder}"
    if missing := [name for name in fields if name not in example]:
        raise ConfigError(
            f"{folder} has records of {', '.join(sorted(example))}, without {', '.join(missing)}; "
            f"name another folder, or make it with `{make}`"
        )
    for name, (axes, kind) in fields.items():
        value = example[name]
        if kind is None:
            if not isinstance(value, str):
                raise ConfigError(f"{folder}: {name} must be text, got {type(value).__name__}; make it with `{make}`")
            continue
        value = np.asarray(value)
        if not np.issubdtype(value.dtype, kind):
            raise ConfigError(
                f"{folder}: {name} must be {kind.__name__} numbers, got {value.dtype}; make it with `{make}`"
            )
        if value.ndim != len(axes):
            wanted = ", ".join(str(axis.size or axis.name) for axis in axes)
            raise ConfigError(f"{folder}: {name} must be [{wanted}], got {list(value.shape)}; make it with `{make}`")
        for size, axis in zip(value.shape, axes):
            fits = axis.size is None or size == axis.size or (axis.or_more and size > axis.size)
            if not fits or not size:
                wanted = f"{axis.size or 1}{' or more' if axis.or_more or axis.size is None else ''}"
                asked = f" ({axis.asked_by})" if axis.asked_by else ""
                raise ConfigError(
                    f"{folder} has {name} of {size} {axis.name}, the run takes {wanted}{asked}; name another folder, "
                    f"change the config, or make it with `{make}`"
                )


def made_with(data: DataConfig) -> dict[str, Any]:
    """The settings that `helios_jax.precompute` made the records with; empty for records made otherwise.

    Raises ConfigError, in one line, for a file of settings that is damaged.
    """
    path = location(data.folder) / PLAN
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"data.folder: {path} cannot be read ({error}); copy the folder again") from None


def load_embedding(data: DataConfig, name: str, like: Example, make: str) -> np.ndarray:
    """The embedding `name` beside the records, of the shape of theirs.

    Raises ConfigError, in one line, for one that is missing, damaged or of another shape.
    """
    path = location(data.folder) / name
    try:
        with path.open("rb") as file:
            array = np.load(file)
    except (OSError, ValueError, EOFError) as error:
        state = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        raise ConfigError(f"data.folder: {path} {state}; make the folder again with `{make}`") from None
    shape = like["text"].shape
    if array.shape != shape:
        raise ConfigError(
            f"data.folder: {path} is {list(array.shape)}, the records' text {list(shape)}; make the folder again with "
            f"`{make}`"
        )
    return array
