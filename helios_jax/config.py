"""Configuration: plain dataclasses, YAML files over a `base:`, dotted overrides; all checked before anything starts.

`load` reads `configs/x.yaml`, the file its `base:` names (relative to it, and so on), then `optim.lr=1e-4` overrides,
the later winning. Each value is merged on its own, so an error names the file or override it came from. A dataclass
states what its values may be in `__post_init__`: a `ValueError` whose message starts with the field's name.
An optional part is None or a value: `null` leaves it out, `{}` takes its defaults.
A path that is not here is looked up among the configs that come with the package (`find`).
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from helios_jax import config_files
from helios_jax.config_types import did_you_mean, misfit, misfit_at, options, shown, unknown_part
from helios_jax.locations import location, replacing
from helios_jax.messages import one_line

T = TypeVar("T")

SUFFIXES = (".yaml", ".yml")
# In an installed package the configs lie in it, in a checkout beside it.
PACKAGED = tuple(folder / "configs" for folder in (Path(__file__).parent, Path(__file__).parent.parent))


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line: where, which key, the rule, the remedy."""


def load(
    path: str | Path,
    overrides: Sequence[str],
    schema: type[T],
    flags: Mapping[str, Any] | None = None,
    names: Mapping[str, str] | None = None,
    under: Mapping[str, Mapping[str, Any]] | None = None,
) -> T:
    """An instance of the dataclass `schema`: its defaults, the YAML file `path` over its bases, then `overrides`.

    `flags` are values of top-level fields as a person typed them (strings, or lists and dicts of them), taken
    literally; they win over everything. A flag is named as its field is, unless `names` has another. `under` maps the
    name of a source to values that win over the file, but not over overrides and flags.

    Raises ConfigError, in one line, for a file that is missing or not YAML, an unknown key, a wrong type, a value
    out of range, an override that is not `key=value`. Reads files and nothing else.
    """
    flag = {name: f"--{name.replace('_', '-')}" for name in flags or {}} | dict(names or {})
    typed = [(flag[name], {name: _literal(value)}) for name, value in (flags or {}).items()]
    middle = [(source, _literal(dict(values))) for source, values in (under or {}).items()]
    return _of_sources([*_files(find(path)), *middle, *map(_override, overrides), *typed], schema, str(path))


def from_dict(values: Any, schema: type[T], source: str) -> T:
    """An instance of `schema` of plain values that come from `source`.

    Raises ConfigError, in one line that begins with `source`, as `load` does.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{source}: must hold `key: value` pairs, not a {type(values).__name__}")
    return _of_sources([(source, _literal(dict(values)))], schema, source)


def _of_sources(named: Sequence[tuple[str, dict]], schema: type[T], default: str) -> T:
    """An instance of `schema` of the values of each source, the later winning."""
    merged = OmegaConf.structured(schema)
    sources: dict[str, str] = {}
    for source, values in named:
        for key, value in _leaves(values):
            merged = _merge(merged, key, value, source, schema)
            sources[key] = source
    try:
        values: Any = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as e:
        raise ConfigError(f"{default}: {getattr(e, 'full_key', None)}: {_first_line(e)}") from None
    return _build(schema, merged, values, "", sources, default)


def find(path: str | Path) -> Path:
    """The file at `path`, or the config of that name in the package: configs/toy/sample.yaml is also toy/sample.

    Raises ConfigError when there is neither.
    """
    try:
        path = location(path)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    try:
        if path.is_file():
            return path
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise ConfigError(f"{str(path)[:80]}: cannot be opened ({error.strerror}); name a config") from None
    folder = next((folder for folder in PACKAGED if folder.is_dir()), None)
    name = path.relative_to("configs") if path.parts[:1] == ("configs",) else path
    name = name if name.suffix in SUFFIXES else Path(f"{name}{SUFFIXES[0]}")
    if folder is not None and (folder / name).is_file():
        return folder / name
    near = did_you_mean(path.name, _names(path.parent))
    known = [] if near or folder is None else [str(file.relative_to(folder)) for file in sorted(folder.rglob("*.yaml"))]
    raise ConfigError(f"{path}: no such file{near or did_you_mean(str(name), known)}")


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("*.y*ml")] if folder.is_dir() else []


def peek(path: str | Path, overrides: Sequence[str], key: str) -> tuple[Any, str] | None:
    """The value of a top-level key, and the file or override that gives it, without a schema; None if none gives it.

    Raises ConfigError for files and overrides that cannot be read.
    """
    found = None
    for source, values in _sources(path, overrides):
        if key in values:
            found = values[key], source
    return found


def keys(overrides: Sequence[str]) -> set[str]:
    """The keys that overrides set, with dots, however they are written: mesh.fsdp also for mesh={fsdp: 2}."""
    return {key for text in overrides for key, _ in _leaves(_override(text)[1])}


def unknown(path: str | Path, overrides: Sequence[str], schema: type) -> list[tuple[str, list[str]]]:
    """(file or override, its keys without a field in `schema`), the later winning; flow.times for flow.times.shift.

    Raises ConfigError for files and overrides that cannot be read.
    """
    found = [
        (source, [part for key, _ in _leaves(values) if (part := unknown_part(schema, key))])
        for source, values in _sources(path, overrides)
    ]
    return [(source, list(dict.fromkeys(parts))) for source, parts in found if parts]


def save(config: Any, path: str | Path) -> None:
    """Writes a dataclass instance as YAML that `load` reads back to an equal one."""
    path = location(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_text(OmegaConf.to_yaml(OmegaConf.create(to_dict(config))))


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain dicts, lists and scalars, ready for YAML or JSON."""
    return _plain(dataclasses.asdict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _literal(value: Any) -> Any:
    """`value` with every string in it protected from interpolation."""
    if isinstance(value, dict):
        return {k: _literal(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_literal(v) for v in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value


def _sources(path: str | Path, overrides: Sequence[str]) -> list[tuple[str, dict]]:
    """(file or override, its values), the later winning."""
    return [*_files(find(path)), *map(_override, overrides)]


def _files(path: Path) -> list[tuple[str, dict]]:
    """(name, values) of the file at `path` and of its bases, the outermost base first."""
    chain: list[tuple[str, dict]] = []
    seen: set[Path] = set()
    named_by = ""
    while True:
        if not path.is_file():
            raise ConfigError(f"{path}: no such file{named_by}{did_you_mean(path.name, _names(path.parent))}")
        if path.resolve() in seen:
            raise ConfigError(f"{path}: its chain of `base:` files comes back to itself; remove one `base:`")
        seen.add(path.resolve())
        try:
            values = config_files.read(path)
        except ValueError as e:
            raise ConfigError(f"{path}: {e}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: must hold `key: value` pairs, not a {type(values).__name__}")
        base = values.pop("base", None)
        chain.append((str(path), values))
        if base is None:
            return chain[::-1]
        if not isinstance(base, str):
            raise ConfigError(f"{path}: base: must be the path of one YAML file, relative to this one, got {base!r}")
        named_by = f" (the base of {path})"
        path = path.parent / base


def _override(text: str) -> tuple[str, dict]:
    key, equals, _ = text.partition("=")
    source = f"override {shown(text)}"
    if not equals or not key or key.startswith("-"):
        raise ConfigError(f"{source}: must read key=value, as in optim.lr=1e-4")
    try:
        return source, config_files.read_override(text)
    except ValueError as e:
        raise ConfigError(f"{source}: {e}") from None


def _leaves(values: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _merge(merged: Any, key: str, value: Any, source: str, schema: type) -> Any:
    nested = value
    for part in reversed(key.split(".")):
        nested = {part: nested}
    if wrong := misfit_at(schema, key, value):
        raise ConfigError(_place(source, wrong, key))
    try:
        return OmegaConf.unsafe_merge(merged, nested)  # in place: a copy for each key takes most of the time
    except (OmegaConfBaseException, ValueError, TypeError) as e:
        raise ConfigError(f"{source}: {key}: {_first_line(e)}") from None


def _place(source: str, message: str, key: str = "") -> str:
    """`message` after the name of its `source`; a flag replaces a `key` that the message begins with."""
    if source.startswith("--") and message.startswith(key):
        rest = message[len(key) :]
        if rest.startswith("[") or "." in key:  # of a list's item
            return f"{source}: {message.partition('.')[2] or message}"
        return f"{source}{rest}" if rest.startswith(" ") else f"{source}: {message}"
    return f"{source}: {message}"


def _build(cls: Any, node: Any, values: dict, prefix: str, sources: dict[str, str], default: str) -> Any:
    """Builds the dataclass `cls` from `values`, inner dataclasses first, so that a range error names its key."""
    arguments, hints = {}, get_type_hints(cls)
    for f in dataclasses.fields(cls):
        key, value, child = f"{prefix}{f.name}", values[f.name], node._get_node(f.name)
        source = sources.get(key, default)
        if isinstance(value, dict) and dataclasses.is_dataclass(child._metadata.object_type):
            value = _build(child._metadata.object_type, child, value, f"{key}.", sources, default)
        elif isinstance(value, list) and value and dataclasses.is_dataclass(kind := get_args(hints[f.name])[0]):
            nodes = [child._get_node(i) for i in range(len(value))]
            value = [
                _build(kind, node, item, f"{key}[{i}].", sources, source)
                for i, (node, item) in enumerate(zip(nodes, value))
            ]
        elif isinstance(value, list | tuple):
            if wrong := misfit(hints[f.name], value, key):  # once it is resolved
                raise ConfigError(_place(source, wrong, key))
            value = _tuples(value, hints[f.name])
        elif value == "???":
            raise ConfigError(f"{source}: {key}: has no default; give it a value")
        arguments[f.name] = value
    try:
        return cls(**arguments)
    except ValueError as e:
        message = one_line(e, most=None)
        first = re.split(r"[ =:,]", message, maxsplit=1)[0]
        named = [name for name in arguments if re.search(rf"\b{name}\b", message)]
        if first in arguments:
            message = prefix + message
            named = [first, *named]
        elif prefix:
            message = f"{prefix.rstrip('.')}: {message}"
        # The place that gives the field, else one that the message names, else one of the same part.
        places = [[s for k, s in sources.items() if f"{k}.".startswith(f"{prefix}{name}.")] for name in named]
        near = [s for k, s in sources.items() if k.startswith(prefix)] if prefix else []
        source = next((place[-1] for place in [*places, near] if place), default)
        raise ConfigError(_place(source, message, prefix + first if first in arguments else "-")) from None


def _tuples(value: Any, hint: Any) -> Any:
    """Lists as the (nested) tuples of numbers or texts that `hint` asks for; OmegaConf converts only the outer one."""
    hint = next((kind for kind in options(hint) if get_origin(kind) is tuple), None)
    if hint is None:
        return value
    kinds = get_args(hint)
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(value)
    return tuple(
        kind(item) if kind in (int, float, str) else _tuples(item, kind) if isinstance(item, list | tuple) else item
        for kind, item in zip(kinds, value)
    )


def _first_line(e: Exception) -> str:
    return str(e).strip().split("\n")[0]


def require(ok: bool, message: str) -> None:
    """Raises ValueError with `message` unless `ok`: for the checks of config classes."""
    if not ok:
        raise ValueError(message)
