"""Configuration: plain dataclasses, YAML files over a `base:`, dotted overrides; all checked before anything starts.

`load` reads `configs/x.yaml`, the file its `base:` names (relative to it, and so on), then `optim.lr=1e-4` overrides,
the later winning. Each value is merged on its own, so an error names the file or override it came from. A dataclass
states what its values may be in `__post_init__`: a `ValueError` whose message starts with the field's name.
An optional part is None or a value: `null` leaves it out, `{}` takes its defaults.
"""

import dataclasses
import difflib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from helios_jax.diffusion.corruption import CorruptionConfig, DropConfig
from helios_jax.diffusion.memory import MemoryConfig
from helios_jax.models.transformer import TransformerConfig
from helios_jax.models.vae import VAEConfig

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line: where, which key, the rule, the remedy."""


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


# ---------------------------------------------------------------------------------------------------------------------
# What a training run is
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class ModelConfig:
    """Sizes of the networks a run makes; null: not part of it, or read from what `init` names."""

    transformer: TransformerConfig | None = None
    vae: VAEConfig | None = None


@dataclass
class DataConfig:
    """Where clips come from and how many make a step; `batch_size` is global, over all hosts and devices."""

    folder: str = "data/toy"
    batch_size: int = 8
    frames: int = 33  # pixel frames of a clip (the vae stage); 1 + a multiple of 4
    crop: int | None = None  # side in pixels of a random square of each clip (the vae stage); null: whole frames
    seed: int = 0  # of the shuffle, apart from the run's seed so that two runs can see the same clips

    def __post_init__(self):
        _require(self.batch_size > 0, f"batch_size must be at least 1, got {self.batch_size}")
        _require(
            self.frames > 0 and self.frames % 4 == 1,
            f"frames must be 1 + a multiple of 4 (the VAE's step in time), got {self.frames}; try 9, 17 or 33",
        )
        _require(
            self.crop is None or (self.crop > 0 and self.crop % 8 == 0),
            f"crop must be a multiple of 8 (the VAE's step in space), got {self.crop}; try 32 or 64",
        )


@dataclass
class EMAConfig:
    """A running average of the parameters, kept in float32; until step `start` it equals them."""

    decay: float = 0.999
    start: int = 0

    def __post_init__(self):
        _require(0.0 < self.decay < 1.0, f"decay must be between 0 and 1, got {self.decay}")
        _require(self.start >= 0, f"start must not be negative, got {self.start}")


@dataclass
class OptimConfig:
    """AdamW; the learning rate climbs linearly for `warmup_steps`, then stays or falls to `final_lr` as a cosine."""

    lr: float = 5e-5
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-4  # of matrices and kernels only: biases and scales of norms are left alone
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    final_lr: float = 0.0
    clip_norm: float | None = 1.0
    ema: EMAConfig | None = None

    def __post_init__(self):
        _require(self.lr > 0, f"lr must be above 0, got {self.lr}")
        _require(all(0 <= b < 1 for b in self.betas), f"betas must lie in [0, 1), got {self.betas}")
        _require(self.eps > 0, f"eps must be above 0, got {self.eps}")
        _require(self.weight_decay >= 0, f"weight_decay must not be negative, got {self.weight_decay}")
        _require(self.warmup_steps >= 0, f"warmup_steps must not be negative, got {self.warmup_steps}")
        _require(0 <= self.final_lr <= self.lr, f"final_lr must lie between 0 and lr={self.lr}, got {self.final_lr}")
        _require(
            self.clip_norm is None or self.clip_norm > 0,
            f"clip_norm must be above 0, or null for no clipping, got {self.clip_norm}",
        )


@dataclass
class MeshConfig:
    """Devices along each mesh axis; the one axis that is null takes the devices the others leave."""

    data: int | None = None
    fsdp: int | None = 1
    tensor: int | None = 1
    context: int | None = 1
    processes: int = 1  # one per host; more than one: each host runs the same command, see `sharding.join_hosts`

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        _require(sizes.pop("processes") > 0, f"processes must be at least 1, got {self.processes}")
        for name, size in sizes.items():
            _require(size is None or size > 0, f"{name} must be at least 1, or null for the rest, got {size}")
        rest = [name for name, size in sizes.items() if size is None]
        _require(
            len(rest) < 2, f"{(rest or [''])[-1]} cannot be null too: only one axis can take the rest, here {rest}"
        )


@dataclass
class CheckpointConfig:
    """A checkpoint every `every` steps and at the end, the newest `keep` of them on disk."""

    folder: str | None = None  # null: `<run>/checkpoints`
    every: int = 500
    keep: int = 2

    def __post_init__(self):
        _require(self.every > 0, f"every must be at least 1, got {self.every}")
        _require(self.keep > 0, f"keep must be at least 1, got {self.keep}")


@dataclass
class ReconstructionConfig:
    """Weights of what the vae stage adds to the mean squared error of the pixels."""

    l1: float = 0.1  # mean absolute error
    edge: float = 0.5  # both errors of the differences between neighbouring pixels: sharp outlines
    kl: float = 1e-6
    first_frame: float = 1.0  # weight of a clip's first frame beside 1 for the others

    def __post_init__(self):
        for name, weight in dataclasses.asdict(self).items():
            _require(weight >= 0, f"{name} must not be negative, got {weight}")


@dataclass
class FlowConfig:
    """The flow stage: memory, what is done to the history, and the distribution of times.

    Times are logit-normal: sigma falls with sigmoid(logit_mean + logit_std * normal). `text_drop` is how often the
    caption is replaced by the empty one, which classifier-free guidance needs; released models start from one that
    knows it. `components` is a diffusers folder whose other parts (VAE, text encoder, tokenizer, scheduler) are copied
    beside the exported transformer, so that the export is a whole pipeline; null exports the transformer alone.
    """

    memory: MemoryConfig = field(default_factory=MemoryConfig)
    drop: DropConfig | None = field(default_factory=DropConfig)
    corruption: CorruptionConfig | None = field(default_factory=CorruptionConfig)
    logit_mean: float = 0.0
    logit_std: float = 1.0
    text_drop: float = 0.0
    components: str | None = None

    def __post_init__(self):
        _require(self.logit_std > 0, f"logit_std must be above 0, got {self.logit_std}")
        _require(0 <= self.text_drop < 1, f"text_drop must lie in [0, 1), got {self.text_drop}")


@dataclass
class TrainConfig:
    """One training run. `run` is the folder for everything it writes."""

    stage: str = "flow"
    run: str = "runs/train"
    init: str | None = None  # a diffusers folder or hub name to start from; null: random weights
    steps: int = 1000
    seed: int = 0
    log_every: int = 20
    precision: Literal["float32", "bfloat16"] = "bfloat16"  # of matrix products; parameters stay float32
    remat: Literal["block"] | None = None  # "block": the backward pass computes each block again, to save memory
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)

    def __post_init__(self):
        _require(self.steps > 0, f"steps must be at least 1, got {self.steps}")
        _require(self.log_every > 0, f"log_every must be at least 1, got {self.log_every}")
        _require(bool(self.run), "run must name a folder")
        _require(self.seed >= 0, f"seed must not be negative, got {self.seed}")
        names = stage_names()
        _require(
            self.stage in names or ("." in self.stage and _exists(self.stage)),
            f"stage must be one of {', '.join(names)}, or the dotted path of a module of yours; "
            f"got {self.stage!r}{_nearest(self.stage, names)}",
        )


def stage_names() -> list[str]:
    """The stages that come with the project: the modules of `helios_jax.training.stages`."""
    folder = Path(__file__).parent / "training" / "stages"
    return sorted(p.stem for p in folder.glob("*.py") if not p.stem.startswith("_"))


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


# ---------------------------------------------------------------------------------------------------------------------
# Reading and writing
# ---------------------------------------------------------------------------------------------------------------------


def load(path: str | Path, overrides: Sequence[str], schema: type[T], flags: Mapping[str, str] | None = None) -> T:
    """An instance of the dataclass `schema`: its defaults, the YAML file at `path` over its bases, then `overrides`.

    `flags` are values of top-level fields as a person typed them, taken literally; they win over everything.

    Raises ConfigError, in one line, for a file that is missing or not YAML, an unknown key, a wrong type, a value
    out of range, an override that is not `key=value`. Reads files and nothing else.
    """
    merged = OmegaConf.structured(schema)
    sources: dict[str, str] = {}
    typed = [
        (f"--{name.replace('_', '-')}", {name: value.replace("${", "\\${")}) for name, value in (flags or {}).items()
    ]
    for source, values in [*_files(Path(path)), *map(_override, overrides), *typed]:
        for key, value in _leaves(values):
            merged = _merge(merged, key, value, source, schema)
            sources[key] = source
    try:
        values: Any = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as e:
        raise ConfigError(f"{path}: {getattr(e, 'full_key', None)}: {_first_line(e)}") from None
    return _build(schema, merged, values, "", sources, str(path))


def save(config: Any, path: str | Path) -> None:
    """Write a dataclass instance as YAML that `load` reads back to an equal one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(OmegaConf.to_yaml(OmegaConf.create(to_dict(config))))
    temporary.replace(path)


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain dicts, lists and scalars, ready for YAML or JSON."""
    return _plain(dataclasses.asdict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _files(path: Path) -> list[tuple[str, dict]]:
    """(name, values) of the file at `path` and of its bases, the outermost base first."""
    chain: list[tuple[str, dict]] = []
    seen: set[Path] = set()
    named_by = ""
    while True:
        if not path.is_file():
            near = _nearest(path.name, [p.name for p in path.parent.glob("*.y*ml")]) if path.parent.is_dir() else ""
            raise ConfigError(f"{path}: no such file{named_by}{near}")
        if path.resolve() in seen:
            raise ConfigError(f"{path}: its chain of `base:` files comes back to itself; remove one `base:`")
        seen.add(path.resolve())
        try:
            loaded = OmegaConf.load(path)
        except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as e:
            raise ConfigError(f"{path}: not valid YAML: {_one_line(e)}") from None
        values = OmegaConf.to_container(loaded)
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
    if not equals or not key or key.startswith("-"):
        raise ConfigError(f"override {text!r}: must read key=value, as in optim.lr=1e-4")
    try:
        values: Any = OmegaConf.to_container(OmegaConf.from_dotlist([text]))
    except (yaml.YAMLError, OmegaConfBaseException) as e:
        raise ConfigError(f"override {text!r}: cannot read the value: {_one_line(e)}") from None
    return f"override {text!r}", values


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
    try:
        return OmegaConf.merge(merged, nested)
    except (ConfigKeyError, ConfigAttributeError) as e:
        bad = str(e.full_key or key)
        owner = e.object_type if dataclasses.is_dataclass(e.object_type) else schema
        names = [f.name for f in dataclasses.fields(owner)]
        near = _nearest(bad.rpartition(".")[2], names) or f"; {owner.__name__} has {', '.join(names)}"
        raise ConfigError(f"{source}: {bad}: no such key{near}") from None
    except (OmegaConfBaseException, ValueError, TypeError) as e:
        raise ConfigError(f"{source}: {key}: {_rule(schema, key, value) or _first_line(e)}") from None


def _rule(schema: type, key: str, value: Any) -> str:
    """What the field at a dotted key must be, from its annotation."""
    annotation: Any = schema
    for part in key.split("."):
        owner = next(
            (t for t in [annotation, *getattr(annotation, "__args__", ())] if dataclasses.is_dataclass(t)), None
        )
        annotation = owner and next((f.type for f in dataclasses.fields(owner) if f.name == part), None)
        if annotation is None:
            return ""
    name = annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")
    return f"must be {name.replace('None', 'null')}, got {value!r}"


def _build(cls: Any, node: Any, values: dict, prefix: str, sources: dict[str, str], default: str) -> Any:
    """`values` as the dataclass `cls`, part by part from the inside, so that a range error knows its key."""
    arguments, hints = {}, get_type_hints(cls)
    for f in dataclasses.fields(cls):
        key, value, child = f"{prefix}{f.name}", values[f.name], node._get_node(f.name)
        source = sources.get(key, default)
        if isinstance(value, dict) and dataclasses.is_dataclass(child._metadata.object_type):
            value = _build(child._metadata.object_type, child, value, f"{key}.", sources, default)
        elif isinstance(value, list | tuple):
            value = _tuples(value, hints[f.name], f"{source}: {key}: {_rule(cls, f.name, value)}")
        elif value == "???":
            raise ConfigError(f"{source}: {key}: has no default; give it a value")
        arguments[f.name] = value
    try:
        return cls(**arguments)
    except ValueError as e:
        message = _one_line(e)
        first = message.split(" ")[0].split("=")[0].rstrip(":,")
        key = prefix + first if first in arguments else prefix.rstrip(".") or cls.__name__
        set_by = [s for k, s in sources.items() if k == key or k.startswith(f"{key}.")]
        near = [s for k, s in sources.items() if k.startswith(prefix)] if prefix else []
        raise ConfigError(f"{(set_by or near or [default])[-1]}: {key}: {message}") from None


def _tuples(value: Any, hint: Any, error: str) -> Any:
    """Lists as the (nested) tuples of ints, floats or strings that `hint` asks for; OmegaConf checks the outer one."""
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    hint = next((o for o in options if get_origin(o) is tuple), None)
    if hint is None:
        return value
    kinds = get_args(hint)
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(value)
    if len(kinds) != len(value):
        raise ConfigError(error)
    for kind, item in zip(kinds, value):
        nested = get_origin(kind) is tuple
        if nested != isinstance(item, list | tuple) or (kind is int and not isinstance(item, int)):
            raise ConfigError(error)
    return tuple(
        _tuples(item, kind, error) if isinstance(item, list | tuple) else item for kind, item in zip(kinds, value)
    )


def _nearest(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _first_line(e: Exception) -> str:
    return str(e).strip().split("\n")[0]


def _one_line(e: Exception) -> str:
    return " ".join(str(e).split())
