"""LoRA files of diffusers, PEFT, Wan and musubi-tuner, all under the names of diffusers' modules.

`blocks.0.attn1.to_q` stands for what is stored as `transformer.blocks.0.attn1.to_q.lora_A.weight` (diffusers),
`base_model.model.blocks...` (PEFT), `diffusion_model.blocks.0.self_attn.q.lora_down.weight` (Wan, as ComfyUI saves it)
or `lora_unet_blocks_0_self_attn_q.lora_down.weight` (musubi-tuner). Only headers and scalars are read here.
"""

import math
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from helios_jax.locations import LocationError, is_remote, location
from helios_jax.lora.keys import IMAGE, part_of
from helios_jax.pretrained import CheckpointError, read_json
from helios_jax.pretrained.configs import parse_json
from helios_jax.pretrained.files import read_header
from helios_jax.pretrained.hub import check_hub_name, from_hub, list_files
from helios_jax.pretrained.kinds import SCALED, check_dtypes
from helios_jax.pretrained.layout import some
from helios_jax.pretrained.load import InMemory, Stored

WEIGHTS = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # diffusers' name, then PEFT's name
PEFT_CONFIG = "adapter_config.json"
ON_HUB = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)/(?P<file>.+)")  # a file of a repository
WHOLE = "; whole weights are no LoRA: name their folder as the model"
METADATA = "lora_adapter_metadata"  # key of PEFT's config in the header of diffusers' files


@dataclass
class Change:
    """The change of one module: its weight gets `scaling` * up @ down or `diff`, its bias gets `bias` and `diff_b`.

    As in files, `down` is [rank, in, *kernel], `up` is [out, rank, *ones] and `diff` has the shape of the weight.
    """

    down: Stored | None = None
    up: Stored | None = None
    bias: Stored | None = None  # PEFT's lora_B.bias, scaled like the weights
    diff: Stored | None = None
    diff_b: Stored | None = None  # a change of the bias without the alpha scale
    diff_m: Stored | None = None  # a change of Wan's modulation, which is ignored
    scaling: float = 1.0

    @property
    def rank(self) -> int:
        return self.down.shape[0] if self.down is not None and self.down.shape else 0


@dataclass(frozen=True)
class LoRAFile:
    """The changes of one file, by module, and the metadata of its header.

    Large tensors are read when a model needs them.
    """

    source: str
    changes: dict[str, Change] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)


def read(name: str | Path, *, weight_name: str | None = None, revision: str | None = None) -> LoRAFile:
    """The LoRA in a safetensors file, in a folder, or in a hub repository.

    Args:
        name: a file; or a folder or repository that holds one file, or one of diffusers' or PEFT's name; or a file
            of a repository, such as owner/repository/file.safetensors.
        weight_name: which file of the folder or repository.
        revision: branch, tag or commit of the repository.

    Raises:
        CheckpointError: there is no such file, or something in it is no LoRA; one line names the keys.
    """
    path = _find(name, weight_name, revision)
    tensors, metadata = read_header(path)
    config: dict[str, Any] = {}
    if METADATA in metadata:
        values = parse_json(metadata[METADATA], f"{path}: its metadata's {METADATA}")
        config = {k.removeprefix("transformer."): v for k, v in values.items()}
    elif path.name == WEIGHTS[1] and (path.parent / PEFT_CONFIG).is_file():
        config = read_json(path.parent / PEFT_CONFIG)
    return replace(_parse(tensors, config, str(path)), metadata=metadata)


def file_and_scale(text: str) -> tuple[str, float]:
    """Splits a command-line value: a file or a repository, and an optional =SCALE.

    A path that exists is taken whole. Otherwise a number after the last = is the scale. Without a number, the = is part
    of the name. Raises ValueError for a scale that is not finite, and for text other than a number after a file's name.
    """
    name, equals, scale = text.rpartition("=")
    if not equals or location(text).exists():
        return text, 1.0
    try:
        return name, check_scale(float(scale), f"LoRA {text}")
    except ValueError as error:
        if "finite" in str(error):
            raise
    if name.endswith(".safetensors") or location(name).exists():
        raise ValueError(f"LoRA {text}: the scale after = is not a number")
    return text, 1.0


def check_scale(scale: float, what: str) -> float:
    """Returns `scale`. Raises ValueError, which begins with `what`, unless it is a finite number."""
    if not math.isfinite(scale):
        raise ValueError(f"{what}: the scale is {scale}, give a finite number")
    return scale


def from_arrays(arrays: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> LoRAFile:
    """Like `read`, from arrays under the keys of a file; `config` has PEFT's keys (r, lora_alpha, ...)."""
    return _parse({key: InMemory(value, key) for key, value in arrays.items()}, dict(config or {}), "the mapping")


def _find(name: str | Path, weight_name: str | None, revision: str | None) -> Path:
    """The file of `name`, downloaded if it is on the hub."""
    try:
        path = location(name)
    except LocationError as error:
        raise CheckpointError(str(error)) from None
    if path.is_file():
        return path
    if path.is_dir():
        return path / (weight_name or _guess(name, [file.name for file in path.iterdir()]))
    if is_remote(path):
        raise CheckpointError(f"no file {name}: give a LoRA's safetensors file or its folder")
    repository = str(name)
    if path.suffix == ".safetensors":
        # A path whose first folder is here is a file that is missing, rather than one on the hub.
        if not (match := ON_HUB.fullmatch(repository)) or Path(match["repository"].split("/")[0]).is_dir():
            raise CheckpointError(f"no file {name}: give a LoRA's safetensors file, its folder, or a hub name")
        repository, weight_name = match["repository"], match["file"]
    check_hub_name(repository)
    weight_name = weight_name or _guess(name, list_files(repository, revision))
    if weight_name == WEIGHTS[1]:
        _download(repository, PEFT_CONFIG, revision)
    return _download(repository, weight_name, revision)


def _download(repository: str, file: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(from_hub(f"{repository}/{file}", lambda: hf_hub_download(repository, file, revision=revision)))


def _guess(name: str | Path, names: list[str]) -> str:
    found = [n for n in names if n.endswith(".safetensors") and "/" not in n]
    for usual in WEIGHTS:
        if usual in found:
            return usual
    if len(found) != 1:
        which = f"several safetensors files ({some(found)}): say which with weight_name" if found else "no safetensors"
        raise CheckpointError(f"{name} holds {which}")
    return found[0]


def _parse(tensors: Mapping[str, Stored], config: dict[str, Any], source: str) -> LoRAFile:
    file = LoRAFile(source)
    alphas: dict[str, float] = {}
    dtypes: dict[str, np.dtype] = {}
    strange, image = [], set()
    for key, tensor in tensors.items():
        if (found := part_of(key)) is None:
            strange.append(key)
            continue
        module, part = found
        if IMAGE.fullmatch(module):
            image.add(module)
        elif part == "alpha":
            alphas[module] = _alpha(tensor, key, source)
        else:
            dtypes[key] = tensor.dtype
            change = file.changes.setdefault(module, Change())
            if getattr(change, part) is not None:
                raise CheckpointError(f"{source} gives {key} twice, under two names of {module}")
            setattr(change, part, tensor)
    check_dtypes(dtypes | {key: tensors[key].dtype for key in strange if SCALED.fullmatch(key)}, source)
    if strange:
        raise CheckpointError(f"{source} holds {some(strange)}: not a LoRA's keys{'' if dtypes else WHOLE}")
    if not file.changes:
        raise CheckpointError(f"{source} holds no LoRA{' but for image inputs, which Helios lacks' if image else ''}")
    if image:
        warnings.warn(
            f"{source}: ignored {len(image)} modules for image inputs, which Helios lacks: {some(image)}", stacklevel=3
        )
    if lost := alphas.keys() - file.changes.keys():
        raise CheckpointError(f"{source} has .alpha but no weights for {some(lost)}")
    if alphas and config:
        raise CheckpointError(f"{source} has both .alpha keys and PEFT's config: which of them scales is unclear")
    _check_pairs(file)
    for name, change in file.changes.items():
        if change.rank and config:
            change.scaling = _peft_scaling(name, change.rank, config, source)
        elif change.rank:
            change.scaling = alphas.get(name, change.rank) / change.rank
    return file


def _alpha(tensor: Stored, key: str, source: str) -> float:
    if np.prod(tensor.shape) != 1:
        raise CheckpointError(f"{source}: {key} is {list(tensor.shape)}, not a single number")
    return float(tensor.read().reshape(()))


def _check_pairs(file: LoRAFile) -> None:
    """Raises `CheckpointError` unless every lora_A has a lora_B of the same rank."""
    halves = [name for name, change in file.changes.items() if (change.down is None) != (change.up is None)]
    if halves:
        raise CheckpointError(f"{file.source} has one half only, lora_A or lora_B, for {some(halves)}")
    empty = [n for n, c in file.changes.items() if any(x is not None and 0 in x.shape for x in (c.down, c.up))]
    if empty:
        raise CheckpointError(f"{file.source}: lora_A or lora_B has rank 0 for {some(empty)}: it must be at least 1")
    wrong = []
    for name, change in file.changes.items():
        if change.down is None or change.up is None:
            continue
        down, up = change.down.shape, change.up.shape
        if len(down) < 2 or len(up) != len(down) or up[1] != down[0] or any(n != 1 for n in up[2:]):
            wrong.append(f"{name} ({list(down)} and {list(up)})")
    if wrong:
        raise CheckpointError(f"{file.source}: the ranks of lora_A and lora_B do not fit for {some(wrong)}")
    both = [name for name, change in file.changes.items() if change.rank and change.diff is not None]
    if both:
        raise CheckpointError(f"{file.source} has both a LoRA and a whole difference (.diff) for {some(both)}")


def _peft_scaling(module: str, rank: int, config: Mapping[str, Any], source: str) -> float:
    """alpha / rank of a module, by PEFT's rules and defaults."""
    if config.get("use_dora"):
        raise CheckpointError(f"{source} is a DoRA (use_dora): only LoRA can be loaded")
    expected = _pattern(config.get("rank_pattern"), module, config.get("r", 8))
    if expected != rank:
        raise CheckpointError(f"{source}: {module} has rank {rank}, but the file's own config says {expected}")
    alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    if type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise CheckpointError(
            f"{source}: {module} has lora_alpha {alpha!r} in the file's own config, not a finite number"
        )
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def matches(module: str, targets: str | Iterable[str]) -> bool:
    """PEFT's rule for target_modules: a regular expression for the whole name, or names and ends of names."""
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets)
