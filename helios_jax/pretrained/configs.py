"""JSON files of a diffusers folder: read with every fault named in one line, checked, and written."""

import dataclasses
import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

from helios_jax.pretrained.errors import CheckpointError

Config = TypeVar("Config")

# No size may exceed the released model's by more than this: a million layers would take hours before an error.
LARGEST = 25


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `CheckpointError` if it cannot be read or holds something else."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: {path.parent} is not a complete diffusers folder") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not JSON: it is not UTF-8 ({error}); download it again") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    return parse_json(text, str(path))


def parse_json(text: str, source: str) -> dict[str, Any]:
    """The object in a JSON text from `source`. Raises `CheckpointError` for anything else."""
    try:
        values = json.loads(text)
    except RecursionError:
        raise CheckpointError(f"{source} is nested too deeply: it is no file of a diffusers folder") from None
    except ValueError as error:
        raise CheckpointError(f"{source} is not JSON: {error}") from None
    if not isinstance(values, dict):
        kind = "null" if values is None else "a list" if isinstance(values, list) else f"a {type(values).__name__}"
        raise CheckpointError(f"{source} holds {kind}, not a JSON object {{...}}: download it again")
    return values


def read_config(folder: Path, cls: type[Config], name: str = "config.json") -> Config:
    """The config dataclass `cls` from `folder`/`name`.

    Unknown keys are ignored with a warning, as in diffusers; the weights must fit the known ones. A class with a
    `MODEL_TYPE` is from transformers, whose files repeat every default of a base class, so it gives no warning.
    """
    path = folder / name
    given = read_json(path)
    _check_class(given, cls, path)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    values = {k: v for k, v in given.items() if not k.startswith("_")}
    unknown = sorted(values.keys() - fields.keys())
    if unknown and not hasattr(cls, "MODEL_TYPE"):
        warnings.warn(f"{path}: ignored, as {cls.__name__} has no {', '.join(unknown)}", stacklevel=2)
    return make_config(checked_fields(values, cls, path), cls, path)


def checked_fields(given: Mapping[str, Any], cls: type, path: Path) -> dict[str, Any]:
    """The values of `given`, from the file `path`, that are fields of the dataclass `cls`, lists as tuples.

    Raises `CheckpointError` for a value of another kind than its field's, or of an absurd size.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    known = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if k in fields}
    hints = get_type_hints(cls)
    for key, value in known.items():
        if value is None and fields[key].default is not None and NoneType not in get_args(hints[key]):
            raise CheckpointError(f"{path}: {key} is null: leave it out, or download the file again")
        _check_value(key, value, fields[key].default, path)
    return known


def make_config(values: Mapping[str, Any], cls: type[Config], path: Path) -> Config:
    """`cls` of checked values from the file `path`; raises `CheckpointError` where they do not go together."""
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _check_class(given: dict[str, Any], cls: Any, path: Path) -> None:
    """Raises `CheckpointError` if the file says that it belongs to another class than `cls`."""
    key, ours = ("model_type", cls.MODEL_TYPE) if hasattr(cls, "MODEL_TYPE") else ("_class_name", cls.CLASS_NAME)
    if (theirs := given.get(key, ours)) != ours:
        raise CheckpointError(f"{path}: {key} is {theirs!r}, not {ours!r}: take this part from a Helios checkpoint")


def _check_value(key: str, value: Any, default: Any, path: Path) -> None:
    """Raises `CheckpointError` unless a field's value is of its default's kind and of a sensible size.

    A null is left to the class; a field that is null by default takes a whole number.
    """
    if value is None or default is dataclasses.MISSING:
        return
    usual, several = default if isinstance(default, tuple) else (1 if default is None else default,), False
    if isinstance(default, tuple):
        most, several = LARGEST * max(len(default), 1), True
        if not isinstance(value, tuple) or len(value) > most:
            raise CheckpointError(f"{path}: {key} is {_short(value)}: it must be a list of at most {most} entries")
    for one in value if several else (value,):
        if rule := _broken_rule(one, usual):
            raise CheckpointError(f"{path}: {key} is {_short(value)}: {rule}")


def _broken_rule(value: Any, usual: tuple[Any, ...]) -> str | None:
    """The rule that a single value breaks where `usual` are the released model's; None if it breaks none.

    A number must be positive if the usual ones are, and an integer at most `LARGEST` times their largest.
    """
    kinds = {type(n) for n in usual}
    if kinds == {bool}:
        return None if type(value) is bool else "it must be true or false"
    if kinds == {str}:
        return None if type(value) is str else "it must be a string"
    whole = kinds == {int}
    if type(value) is not int and (type(value) is not float or whole):
        return f"it must be a {'whole number' if whole else 'number'}"
    if not math.isfinite(value):
        return "NaN and infinity are no settings; download the file again"
    least = min(usual, default=-math.inf)
    if (least > 0 and value <= 0) or (least == 0 and value < 0):
        return f"it must {'be positive' if least > 0 else 'not be negative'}"
    most = LARGEST * max(usual) if whole else 0
    if most and value > most:
        return f"it must be at most {most}, {LARGEST} times the released Helios model's value"
    return None


def _short(value: Any) -> str:
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def write_config(
    config: Any, folder: Path, name: str = "config.json", *, more: Mapping[str, Any] | None = None
) -> None:
    """Writes a config dataclass in diffusers' format, with `CLASS_NAME` first and the entries of `more` last."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"_class_name": config.CLASS_NAME, **dataclasses.asdict(config)}
    if hasattr(config, "MODEL_TYPE"):  # transformers finds its classes by these two keys
        values = {"architectures": [config.CLASS_NAME], "model_type": config.MODEL_TYPE, **dataclasses.asdict(config)}
    (folder / name).write_text(json.dumps({**values, **(more or {})}, indent=2) + "\n")
