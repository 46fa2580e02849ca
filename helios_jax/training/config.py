"""What a training run is: the schema of configs that train.py reads."""

import dataclasses
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from helios_jax.config import nearest
from helios_jax.diffusion.corruption import CorruptionConfig, DropConfig
from helios_jax.diffusion.memory import MemoryConfig
from helios_jax.models.transformer import TransformerConfig
from helios_jax.models.vae import VAEConfig


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


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
    knows it. `first_chunk` is the share of samples that are a video's first chunk, which alone learns from the text
    what it is to begin with; null: every chunk is as likely. `components` is a diffusers folder whose other parts (VAE,
    text encoder, tokenizer, scheduler) are copied beside the exported transformer, so that the export is a whole
    pipeline; null exports the transformer alone.
    """

    memory: MemoryConfig = field(default_factory=MemoryConfig)
    drop: DropConfig | None = field(default_factory=DropConfig)
    corruption: CorruptionConfig | None = field(default_factory=CorruptionConfig)
    logit_mean: float = 0.0
    logit_std: float = 1.0
    text_drop: float = 0.0
    first_chunk: float | None = None
    components: str | None = None

    def __post_init__(self):
        _require(self.logit_std > 0, f"logit_std must be above 0, got {self.logit_std}")
        _require(self.memory.anchor != "second", "memory.anchor must be first or null: second is for sampling only")
        _require(0 <= self.text_drop < 1, f"text_drop must lie in [0, 1), got {self.text_drop}")
        _require(
            self.first_chunk is None or 0 < self.first_chunk <= 1,
            f"first_chunk must be above 0 and at most 1, got {self.first_chunk}",
        )


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
            f"got {self.stage!r}{nearest(self.stage, names)}",
        )


def stage_names() -> list[str]:
    """The stages that come with the project: the modules of `helios_jax.training.stages`."""
    folder = Path(__file__).parent / "stages"
    return sorted(p.stem for p in folder.glob("*.py") if not p.stem.startswith("_"))


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
