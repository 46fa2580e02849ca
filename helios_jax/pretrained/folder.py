"""diffusers folders: found or downloaded, with the files of their weights."""

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from helios_jax.locations import LocationError, is_remote, location
from helios_jax.pretrained.configs import read_json
from helios_jax.pretrained.errors import CheckpointError
from helios_jax.pretrained.hub import check_hub_name, from_hub, list_files

PACKAGE = Path(__file__).parent.parent

SINGLE = "convert a single-file checkpoint with diffusers' from_single_file and save_pretrained"
WEIGHTS = ("diffusion_pytorch_model", "model")  # weight files as diffusers and transformers name them


def local(name: str | Path) -> Path:
    """The folder `name` as a path; the one place that knows of models in the package.

    A name that begins with helios_jax/, such as helios_jax/assets/toy, is taken in the installed package when there is
    no such folder here, so that configs name the embedded model alike in a checkout and outside it.
    """
    try:
        folder = location(name)
    except LocationError as error:
        raise CheckpointError(str(error)) from None
    if folder.parts[:1] == (PACKAGE.name,) and not folder.exists():
        return PACKAGE.parent / folder
    return folder


def resolve(name: str | Path, parts: Sequence[str] | None = None, revision: str | None = None) -> Path:
    """The folder `name`, or the snapshot of the hub repository `name`; files that are not cached yet are downloaded.

    Args:
        name: a folder (`local`), or a hub name such as BestWishYsh/Helios-Base.
        parts: the subfolders to download beside model_index.json; "." is a component at the top. None: everything.
        revision: branch, tag or commit of the hub repository.

    Raises:
        CheckpointError: there is no such folder, and the hub has no such repository or cannot be reached.
    """
    folder = local(name)
    try:
        if folder.is_dir():
            return folder
        if is_remote(folder):
            raise CheckpointError(f"no folder {name}: give a diffusers folder")
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read: {error.strerror or error}") from None
    if folder.is_file():
        raise CheckpointError(f"{name} is one file, not a diffusers folder: {SINGLE}, or give a LoRA as such")
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


def subfolders(name: str | Path, revision: str | None = None) -> list[str]:
    """The subfolders of a folder or a hub repository that hold a config.json."""
    folder = local(name)
    if folder.is_dir():
        return sorted(path.parent.name for path in folder.glob("*/config.json"))
    files = list_files(name, revision)
    return sorted(f.removesuffix("/config.json") for f in files if re.fullmatch(r"[^/]+/config\.json", f))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a component. Files that its index names may be missing."""
    for name in (f"{stem}.safetensors" for stem in WEIGHTS):
        index = folder / f"{name}.index.json"
        if index.exists():
            return [folder / f for f in _shards(index)]
        if (folder / name).exists():
            return [folder / name]
    expected = " or ".join(f"{stem}.safetensors" for stem in WEIGHTS)
    raise CheckpointError(
        f"{folder} has no weights: {expected} (or an index of shards) is expected there{_hint(folder)}"
    )


def _shards(index: Path) -> list[str]:
    """The files that an index names, all of them in its folder (where links may lead out of it, as the hub's do)."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{index} has no weight_map from tensors to files: download it again")
    for name in names.values():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\0" in name or path.suffix != ".safetensors":
            raise CheckpointError(f"{index} names {name!r}: only safetensors files in its own folder are opened")
    return sorted(set(names.values()))


def _hint(folder: Path) -> str:
    """Names the other weight files of a folder, and what to do with them, as the end of an error's line."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    found = [name for name in names if name.endswith((".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf"))]
    if not found:
        return ""
    first, *others = found
    if match := re.fullmatch(rf"(?:{'|'.join(WEIGHTS)})\.(\w+)(-\d+-of-\d+)?\.safetensors", first):
        return f"; {first} is the variant {match[1]}: download the weights without it, or rename its files"
    if not first.endswith(".safetensors"):
        return f"; {first} is not a safetensors file: download or convert to safetensors"
    return f"; {first}{' and others are' if others else ' is'} of another kind: {SINGLE}"
