"""diffusers folders: found or downloaded, with their JSON files read and written."""

import dataclasses
import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

Config = TypeVar("Config")

PACKAGE = Path(__file__).parent.parent

WEIGHTS = ("diffusion_pytorch_model", "model")  # weight files as diffusers and transformers name them


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The one-line message names the file, the rule and the remedy."""


def local(name: str | Path) -> Path:
    """The folder `name` as a path; the one place that knows of models in the package.

    A name that begins with helios_jax/, such as helios_jax/assets/toy, is taken in the installed package when there is
    no such folder here, so that configs name the embedded model alike in a checkout and outside it.
    """
    folder = Path(name)
    if folder.parts[:1] == (PACKAGE.name,) and not folder.exists():
        return PACKAGE.parent / folder
    return folder


def resolve(name: str | Path, parts: Sequence[str] | None = None, revision: str | None = None) -> Path:
    """The folder `name`, or the hub snapshot of that name, of which what is not cached yet is downloaded.

    Args:
        name: a folder (`local`), or a hub name such as BestWishYsh/Helios-Base.
        parts: the subfolders that are needed, and model_index.json; "." is a component at the top. None: all of it.
        revision: branch, tag or commit of the hub repository.

    Raises:
        CheckpointError: there is no such folder, and the hub has no such repository or cannot be reached.
    """
    folder = local(name)
    if folder.is_dir():
        return folder
    check_hub_name(name)
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model"] if parts is None else ["model_index.json"]
    for part in parts or ():
        patterns += _patterns(part)
    return Path(from_hub(name, lambda: snapshot_download(str(name), allow_patterns=patterns, revision=revision)))


def _patterns(part: str) -> list[str]:
    """Patterns of a component's files, without other variants (fp16) and formats of its weights."""
    names = ["config.json"] if part == "." else ["*.json", "*.model"]
    names += [f"{stem}{end}" for stem in WEIGHTS for end in (".safetensors", "-*-of-*.safetensors")]
    names += [f"{stem}.safetensors.index.json" for stem in WEIGHTS]
    return names if part == "." else [f"{part}/{name}" for name in names]


def check_hub_name(name: str | Path) -> None:
    """Raises `CheckpointError` if `name`, which is not a folder, cannot be a hub repository either."""
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name)):
        raise CheckpointError(
            f"no folder {name}: give a diffusers folder or a hub name such as BestWishYsh/Helios-Base"
        )


def from_hub(name: str | Path, ask: Any) -> Any:
    """Calls `ask()`, which talks to the hub. Raises `CheckpointError` with the reason if it fails."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return ask()
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        line = (str(error).strip() or repr(error)).splitlines()[0]
        raise CheckpointError(f"no folder {name}, and the hub does not give it: {line}") from error


def subfolders(name: str | Path, revision: str | None = None) -> list[str]:
    """The subfolders of a folder or a hub repository that hold a config.json."""
    folder = local(name)
    if folder.is_dir():
        return sorted(path.parent.name for path in folder.glob("*/config.json"))
    from huggingface_hub import list_repo_files

    files = from_hub(name, lambda: list_repo_files(str(name), revision=revision))
    return sorted(f.removesuffix("/config.json") for f in files if re.fullmatch(r"[^/]+/config\.json", f))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `CheckpointError` if it is missing or not JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: {path.parent} is not a complete diffusers folder") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None


def read_config(folder: Path, cls: type[Config], name: str = "config.json") -> Config:
    """The config dataclass `cls` from `folder`/`name`.

    Unknown keys are ignored with a warning, as in diffusers; the weights must fit the known ones. A class with a
    `MODEL_TYPE` is from transformers, whose files repeat every default of a base class, so it gives no warning.
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


def write_config(config: Any, folder: Path, name: str = "config.json") -> None:
    """Writes a config dataclass in diffusers' format, with `CLASS_NAME` first."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"_class_name": config.CLASS_NAME, **dataclasses.asdict(config)}
    if hasattr(config, "MODEL_TYPE"):  # transformers finds its classes by these two keys
        values = {"architectures": [config.CLASS_NAME], "model_type": config.MODEL_TYPE, **dataclasses.asdict(config)}
    (folder / name).write_text(json.dumps(values, indent=2) + "\n")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a component. Files that its index names may be missing."""
    for name in (f"{stem}.safetensors" for stem in WEIGHTS):
        index = folder / f"{name}.index.json"
        if index.exists():
            return [folder / f for f in sorted(set(read_json(index)["weight_map"].values()))]
        if (folder / name).exists():
            return [folder / name]
    expected = " or ".join(f"{stem}.safetensors" for stem in WEIGHTS)
    raise CheckpointError(f"{folder} has no weights: {expected} (or an index of shards) is expected there")
