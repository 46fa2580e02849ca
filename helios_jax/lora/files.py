"""LoRA files of diffusers, PEFT, Wan and musubi-tuner, under one naming: that of diffusers' modules.

`blocks.0.attn1.to_q` stands for what is stored as `transformer.blocks.0.attn1.to_q.lora_A.weight` (diffusers),
`base_model.model.blocks...` (PEFT), `diffusion_model.blocks.0.self_attn.q.lora_down.weight` (Wan, as ComfyUI saves it)
or `lora_unet_blocks_0_self_attn_q.lora_down.weight` (musubi-tuner). Only headers and scalars are read here.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helios_jax.pretrained import CheckpointError
from helios_jax.pretrained.files import read_header
from helios_jax.pretrained.folder import check_hub_name, from_hub, read_json
from helios_jax.pretrained.layout import some
from helios_jax.pretrained.load import InMemory, Stored

WEIGHTS = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # diffusers' name, then PEFT's name
PEFT_CONFIG = "adapter_config.json"
METADATA = "lora_adapter_metadata"  # key of PEFT's config in the header of diffusers' files
PREFIX = re.compile(r"(base_model\.model\.|transformer\.|diffusion_model\.|lora_unet_)+")
KEY = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)"
    r"(\.(?!weight$|bias$)[^.]+)?\.(?P<kind>weight|bias)"  # PEFT may insert the adapter's name before the last word
)
DOWN = ("lora_A", "lora_down", "lora.down")
# Wan's names (or musubi's, where _ joins them) and diffusers'.
WAN = [
    (re.compile(pattern.replace(r"\.", "[._]")), name)
    for pattern, name in (
        (r"blocks\.(\d+)\.self_attn\.([qkv])", r"blocks.\1.attn1.to_\2"),
        (r"blocks\.(\d+)\.self_attn\.o", r"blocks.\1.attn1.to_out.0"),
        (r"blocks\.(\d+)\.cross_attn\.([qkv])", r"blocks.\1.attn2.to_\2"),
        (r"blocks\.(\d+)\.cross_attn\.o", r"blocks.\1.attn2.to_out.0"),
        (r"blocks\.(\d+)\.ffn\.0", r"blocks.\1.ffn.net.0.proj"),
        (r"blocks\.(\d+)\.ffn\.2", r"blocks.\1.ffn.net.2"),
        (r"time_embedding\.0", "condition_embedder.time_embedder.linear_1"),
        (r"time_embedding\.2", "condition_embedder.time_embedder.linear_2"),
        (r"text_embedding\.0", "condition_embedder.text_embedder.linear_1"),
        (r"text_embedding\.2", "condition_embedder.text_embedder.linear_2"),
        (r"time_projection\.1", "condition_embedder.time_proj"),
        (r"head\.head", "proj_out"),
    )
]


@dataclass
class Change:
    """Change that a file makes to one module: `scaling` * up @ down to its weight, and to its bias what follows.

    As in files, down is [rank, in, *kernel] and up [out, rank, *ones]. `diff` is a change of the whole weight.
    """

    down: Stored | None = None
    up: Stored | None = None
    bias: Stored | None = None  # PEFT's lora_B.bias, scaled like the weights
    diff: Stored | None = None
    diff_b: Stored | None = None  # a change of the bias without the alpha scale
    scaling: float = 1.0

    @property
    def rank(self) -> int:
        return 0 if self.down is None else self.down.shape[0]


@dataclass(frozen=True)
class LoRAFile:
    """The changes of one file, by module; large tensors are read when a model needs them."""

    source: str
    changes: dict[str, Change] = field(default_factory=dict)


def read(name: str | Path, *, weight_name: str | None = None, revision: str | None = None) -> LoRAFile:
    """The LoRA in a safetensors file, in a folder, or in a hub repository.

    Args:
        name: a file; or a folder or repository that holds one file, or one of diffusers' or PEFT's name.
        weight_name: which file of the folder or repository.
        revision: branch, tag or commit of the repository.

    Raises:
        CheckpointError: there is no such file, or something in it is no LoRA; one line names the keys.
    """
    path = _find(name, weight_name, revision)
    tensors, metadata = read_header(path)
    config: dict[str, Any] = {}
    if METADATA in metadata:
        try:
            config = {k.removeprefix("transformer."): v for k, v in json.loads(metadata[METADATA]).items()}
        except json.JSONDecodeError as error:
            raise CheckpointError(f"{path}: its metadata's {METADATA} is not JSON: {error}") from None
    elif path.name == WEIGHTS[1] and (path.parent / PEFT_CONFIG).is_file():
        config = read_json(path.parent / PEFT_CONFIG)
    return _parse(tensors, config, str(path))


def file_and_scale(text: str) -> tuple[str, float]:
    """Splits a command-line value: a file or a repository, and an optional =SCALE."""
    name, _, scale = text.partition("=")
    try:
        return name, float(scale or "1")
    except ValueError:
        raise ValueError(f"LoRA {text}: the scale after = is not a number") from None


def from_arrays(arrays: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> LoRAFile:
    """Like `read`, from arrays under the keys of a file; `config` has PEFT's keys (r, lora_alpha, ...)."""
    return _parse({key: InMemory(value) for key, value in arrays.items()}, dict(config or {}), "the mapping")


def _find(name: str | Path, weight_name: str | None, revision: str | None) -> Path:
    """The file of `name`, downloaded if it is on the hub."""
    path = Path(name)
    if path.is_file():
        return path
    if path.suffix == ".safetensors" and not path.is_dir():
        raise CheckpointError(f"no file {name}: give a LoRA's safetensors file, its folder, or a hub name")
    if path.is_dir():
        return path / (weight_name or _guess(name, [file.name for file in path.iterdir()]))
    check_hub_name(name)
    from huggingface_hub import hf_hub_download, list_repo_files

    if weight_name is None:
        weight_name = _guess(name, from_hub(name, lambda: list_repo_files(str(name), revision=revision)))
        if weight_name == WEIGHTS[1]:
            from_hub(name, lambda: hf_hub_download(str(name), PEFT_CONFIG, revision=revision))
    return Path(from_hub(name, lambda: hf_hub_download(str(name), weight_name, revision=revision)))


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
    strange = []
    for key, tensor in tensors.items():
        stem, _, last = key.rpartition(".")
        match = KEY.fullmatch(key)
        if last == "alpha":
            alphas[module_name(stem)] = float(tensor.read().reshape(()))
            continue
        if last in ("diff", "diff_b"):
            module, part = module_name(stem), last
        elif match and not (match["kind"] == "bias" and match["part"] in DOWN):
            module = module_name(match["module"])
            part = "bias" if match["kind"] == "bias" else "down" if match["part"] in DOWN else "up"
        else:
            strange.append(key)
            continue
        change = file.changes.setdefault(module, Change())
        if getattr(change, part) is not None:
            raise CheckpointError(f"{source} gives {key} twice, under two names of {module}")
        setattr(change, part, tensor)
    if strange:
        raise CheckpointError(f"{source} holds {some(strange)}: not a LoRA's keys")
    if not file.changes:
        raise CheckpointError(f"{source} holds no LoRA")
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


def _check_pairs(file: LoRAFile) -> None:
    """Raises `CheckpointError` unless every lora_A has a lora_B of the same rank."""
    halves = [name for name, change in file.changes.items() if (change.down is None) != (change.up is None)]
    if halves:
        raise CheckpointError(f"{file.source} has one half only, lora_A or lora_B, for {some(halves)}")
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


def module_name(name: str) -> str:
    """diffusers' name of a module that has a prefix and Wan's or musubi's name."""
    name = name[match.end() :] if (match := PREFIX.match(name)) else name
    for pattern, theirs in WAN:
        if match := pattern.fullmatch(name):
            return match.expand(theirs)
    return name


def _peft_scaling(module: str, rank: int, config: Mapping[str, Any], source: str) -> float:
    """alpha / rank of a module, by PEFT's rules and defaults."""
    if config.get("use_dora"):
        raise CheckpointError(f"{source} is a DoRA (use_dora): only LoRA can be loaded")
    expected = _pattern(config.get("rank_pattern"), module, config.get("r", 8))
    if expected != rank:
        raise CheckpointError(f"{source}: {module} has rank {rank}, but the file's own config says {expected}")
    alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
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
