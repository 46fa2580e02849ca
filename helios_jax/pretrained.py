"""Weights between diffusers folders (config.json + safetensors) and parameter trees.

A parameter's path, joined with dots, is its key in the file; a class whose attributes are named otherwise says so in
`FILE_NAMES`, pairs of (our path segments, the file's). `FLOAT32` holds the path segments that stay float32 in every
precision, as diffusers' `_keep_in_fp32_modules` does; `TIED` maps a key that files may repeat to the key it repeats.
Every key in a file is used exactly once and every parameter is filled exactly once, or `CheckpointError` names them.
"""

import dataclasses
import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from helios_jax.models.nn import Layout

Model = TypeVar("Model", bound=nnx.Module)
Config = TypeVar("Config")

WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")
SHARD_BYTES = 5 * 2**30


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: the message is one line that names the file, the rule and the remedy."""


@dataclass(frozen=True)
class Entry:
    """Where one tensor of a file goes: a parameter's `path`, the `layer` of a stacked one, its `shape` in the file."""

    path: tuple[Any, ...]
    layer: int | None
    shape: tuple[int, ...]
    layout: Layout


# --- layout ----------------------------------------------------------------------------------------------------------


def _file_shape(shape: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
    if layout == "same":
        return shape
    if layout == "linear":
        return shape[::-1]
    if layout == "conv":
        return (shape[-1], shape[-2], *shape[:-2])
    assert isinstance(layout, tuple)
    return layout


def _to_file(value: Any, layout: Layout) -> Any:
    if layout == "linear":
        return value.T
    if layout == "conv":
        return value.transpose(value.ndim - 1, value.ndim - 2, *range(value.ndim - 2))
    return value if layout == "same" else value.reshape(layout)


def _from_file(value: Any, layout: Layout, shape: tuple[int, ...]) -> Any:
    if layout == "linear":
        return value.T
    if layout == "conv":
        return value.transpose(*range(2, value.ndim), 1, 0)
    return value if layout == "same" else value.reshape(shape)


def _key(path: tuple[Any, ...], names: tuple[tuple[str, str], ...]) -> str:
    key = ".".join(str(p) for p in path)
    for ours, theirs in names:
        key = re.sub(rf"(?<![^.]){re.escape(ours)}(?![^.])", theirs, key)
    return key


def file_entries(model: nnx.Module) -> dict[str, Entry]:
    """Each safetensors key of `model` (concrete or abstract) with the parameter it fills.

    A parameter with one dimension more than it has axis names is stacked over layers; it owns one key per layer, the
    layer's number put after the stack's name.
    """
    names = getattr(type(model), "FILE_NAMES", ())
    entries = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        axes, layout, shape = variable.axes, variable.layout, variable.shape
        if len(shape) == len(axes):
            entries[_key(path, names)] = Entry(path, None, _file_shape(shape, layout), layout)
            continue
        for layer in range(shape[0]):
            key = _key((path[0], layer, *path[1:]), names)
            entries[key] = Entry(path, layer, _file_shape(shape[1:], layout), layout)
    return entries


# --- parameter trees from and to arrays ------------------------------------------------------------------------------


def _check(entries: Mapping[str, Entry], found: Mapping[str, tuple[int, ...]], source: str) -> None:
    def some(keys: Iterable[str]) -> str:
        keys = sorted(keys)
        return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")

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
        raise CheckpointError(f"{source} does not fit its config.json: {'; '.join(problems)}")


def _used_keys(model: nnx.Module, present: Iterable[str]) -> dict[str, str]:
    """Our key -> its name in the file; a tied key counts once, whichever of its names the file holds."""
    tied = getattr(type(model), "TIED", {})
    present = list(present)
    return {tied.get(name, name): name for name in present if name not in tied or tied[name] not in present}


def _fill(
    model: Model, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Any], dtype: Any, source: str
) -> Model:
    entries = file_entries(model)
    keys = _used_keys(model, shapes)
    _check(entries, {k: tuple(shapes[name]) for k, name in keys.items()}, source)

    leaves: dict[tuple[Any, ...], list[str]] = {}
    for key, entry in entries.items():
        leaves.setdefault(entry.path, []).append(key)
    graph, state = nnx.split(model)
    flat = []
    for path, variable in nnx.to_flat_state(state):
        target = dtype_of(model, path, dtype)
        parts = []
        for key in leaves[path]:
            entry = entries[key]
            shape = variable.shape if entry.layer is None else variable.shape[1:]
            value = _from_file(read(keys[key]), entry.layout, shape)
            parts.append(jnp.asarray(value if target is None else value.astype(target)))
        stacked = entries[leaves[path][0]].layer is not None
        flat.append((path, variable.replace(jnp.stack(parts) if stacked else parts[0])))
    return nnx.merge(graph, nnx.from_flat_state(flat))


def dtype_of(model: nnx.Module, path: tuple[Any, ...], dtype: Any) -> Any:
    """The dtype of the parameter at `path` when the model runs in `dtype` (None: as the file has it)."""
    if dtype is None:
        return None
    islands = getattr(type(model), "FLOAT32", ())
    return jnp.float32 if any(str(p) in islands for p in path) else dtype


def from_arrays(model: Model, arrays: Mapping[str, Any], *, dtype: Any = None, source: str = "the mapping") -> Model:
    """`model` (concrete or abstract) filled from arrays under their file keys and in their file layout."""
    return _fill(model, {k: v.shape for k, v in arrays.items()}, lambda k: arrays[k], dtype, source)


def to_arrays(model: nnx.Module) -> dict[str, np.ndarray]:
    """The parameters of `model` under their file keys and in their file layout."""
    values = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    arrays = {}
    for key, entry in file_entries(model).items():
        value = np.asarray(values[entry.path][...])
        value = value if entry.layer is None else value[entry.layer]
        arrays[key] = np.ascontiguousarray(_to_file(value, entry.layout))
    return arrays


# --- folders ---------------------------------------------------------------------------------------------------------


def resolve(name: str | Path) -> Path:
    """The folder `name`, or the hub snapshot of that name, downloaded when it is not cached yet.

    Raises:
        CheckpointError: there is no such folder, and the hub has no such repository or cannot be reached.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        raise CheckpointError(
            f"no folder {name}: give a diffusers folder or a hub name such as BestWishYsh/Helios-Base"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.safetensors", "*.model"]
        return Path(snapshot_download(str(name), allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        line = (str(error).strip() or repr(error)).splitlines()[0]
        raise CheckpointError(f"no folder {name}, and the hub does not give it: {line}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; `CheckpointError` when it is missing or is not JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: {path.parent} is not a complete diffusers folder") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None


def read_config(folder: Path, cls: type[Config], name: str = "config.json") -> Config:
    """The config dataclass `cls` from `folder`/`name`.

    Keys that it does not know are ignored with a warning, as in diffusers; the weights must fit what is known. A class
    with a `MODEL_TYPE` is transformers', whose files repeat every default of a base class: there the rest is silent.
    """
    values = {k: v for k, v in read_json(folder / name).items() if not k.startswith("_")}
    names = {f.name for f in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    unknown = sorted(values.keys() - names)
    if unknown and not hasattr(cls, "MODEL_TYPE"):
        warnings.warn(f"{folder / name}: ignored, as {cls.__name__} has no {', '.join(unknown)}", stacklevel=2)
    try:
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in names})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / name}: {error}") from error


def _weight_files(folder: Path) -> list[Path]:
    for name in WEIGHTS:
        index = folder / f"{name}.index.json"
        if index.exists():
            return [folder / f for f in sorted(set(read_json(index)["weight_map"].values()))]
        if (folder / name).exists():
            return [folder / name]
    raise CheckpointError(f"{folder} has no weights: {' or '.join(WEIGHTS)} (or an index of shards) is expected there")


def _headers(folder: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """Each key with its file and shape; reads headers only."""
    found = {}
    for path in _weight_files(folder):
        try:
            with safe_open(path, "numpy") as file:
                for key in file.keys():  # noqa: SIM118
                    if key in found:
                        raise CheckpointError(f"{path} repeats {key}, which {found[key][0]} holds already")
                    found[key] = (path, tuple(file.get_slice(key).get_shape()))
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing though the index names it: download the folder again") from None
        except SafetensorError as error:
            raise CheckpointError(f"{path} is not a whole safetensors file ({error}): download it again") from None
    return found


def check_weights(model: nnx.Module, folder: Path) -> None:
    """Raises `CheckpointError` unless the files in `folder` fit the (abstract) `model`; reads headers only."""
    found = {k: shape for k, (_, shape) in _headers(folder).items()}
    _check(file_entries(model), {k: found[name] for k, name in _used_keys(model, found).items()}, str(folder))


def load_model(model: Model, folder: Path, *, dtype: Any = None) -> Model:
    """The (abstract) `model` with the weights in `folder`, read tensor by tensor.

    `dtype` is what the parameters become, but for the class's `FLOAT32` islands; None keeps what the file has.
    """
    headers = _headers(folder)
    files: dict[Path, Any] = {}

    def read(key: str) -> np.ndarray:
        path = headers[key][0]
        if path not in files:
            files[path] = safe_open(path, "numpy")
        return files[path].get_tensor(key)

    return _fill(model, {k: shape for k, (_, shape) in headers.items()}, read, dtype, str(folder))


def save_model(model: nnx.Module, config: Any, folder: Path | str, *, dtype: Any = None) -> None:
    """Writes `model` as a diffusers (or transformers) component: config.json and safetensors, sharded past 5 GB.

    The config's class attributes `CLASS_NAME` and `WEIGHTS_NAME` say what diffusers calls the two.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_config(config, folder)
    entries = file_entries(model)
    arrays = {
        k: v if dtype is None else v.astype(dtype_of(model, entries[k].path, dtype))
        for k, v in to_arrays(model).items()
    }
    name = config.WEIGHTS_NAME
    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for key, value in arrays.items():
        if size and size + value.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][key] = value
        size += value.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / name, metadata={"format": "pt"})
        return
    stem = name.removesuffix(".safetensors")
    weight_map = {}
    for i, shard in enumerate(shards):
        file = f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(a.nbytes for a in arrays.values())}, "weight_map": weight_map}
    (folder / f"{name}.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))


def write_config(config: Any, folder: Path, name: str = "config.json") -> None:
    """Writes a config dataclass as diffusers does, its `CLASS_NAME` first."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"_class_name": config.CLASS_NAME, **dataclasses.asdict(config)}
    if hasattr(config, "MODEL_TYPE"):  # transformers finds its classes by these two
        values = {"architectures": [config.CLASS_NAME], "model_type": config.MODEL_TYPE, **dataclasses.asdict(config)}
    (folder / name).write_text(json.dumps(values, indent=2) + "\n")


def count(model: nnx.Module) -> int:
    """The number of parameters of `model`, concrete or abstract."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
