"""The schema of the configs that train.py reads."""

import dataclasses
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from helios_jax.config import nearest, require
from helios_jax.diffusion.corruption import CorruptionConfig, DropConfig
from helios_jax.diffusion.memory import MemoryConfig
from helios_jax.diffusion.schedule import SchedulerConfig
from helios_jax.diffusion.targets import TimesConfig
from helios_jax.models.transformer import TransformerConfig
from helios_jax.models.transformer.remat import Remat
from helios_jax.models.vae import VAEConfig
from helios_jax.sharding import MeshConfig
from helios_jax.training.distill import DistillConfig
from helios_jax.training.optim import OptimConfig
from helios_jax.training.trainable import LoRAConfig


@dataclass
class ModelConfig:
    """Sizes of the networks a run makes; null: not part of it, or read from what `init` names."""

    transformer: TransformerConfig | None = None
    vae: VAEConfig | None = None


@dataclass
class DataConfig:
    """Source of clips, and how many make a step; `batch_size` is global, over all hosts and devices."""

    folder: str = "data/toy"
    batch_size: int = 8
    frames: int = 33  # pixel frames of a clip (the vae stage); 1 + a multiple of 4
    crop: int | None = None  # side in pixels of a random square of each clip (the vae stage); null: whole frames
    seed: int = 0  # of the shuffle, apart from the run's seed so that two runs can see the same clips
    workers: int = 0  # processes that read and cut clips; 0: threads of the run's own do

    def __post_init__(self):
        require(self.workers >= 0, f"workers must not be negative, got {self.workers}")
        require(self.batch_size > 0, f"batch_size must be at least 1, got {self.batch_size}")
        require(
            self.frames > 0 and self.frames % 4 == 1,
            f"frames must be 1 + a multiple of 4 (the VAE's step in time), got {self.frames}; try 9, 17 or 33",
        )
        require(
            self.crop is None or (self.crop > 0 and self.crop % 8 == 0),
            f"crop must be a multiple of 8 (the VAE's step in space), got {self.crop}; try 32 or 64",
        )


@dataclass
class ValidationConfig:
    """Videos of `prompts` every `every` steps, in `<run>/validation`: the model as it is (its average if there is one)
    in the pipeline that `flow.components` has the other parts of."""

    every: int = 500
    prompts: tuple[str, ...] = ()
    negative_prompt: str = ""
    num_frames: int = 99
    height: int = 384
    width: int = 640
    num_inference_steps: int | None = None  # of a model without a pyramid; null: 50
    pyramid_num_inference_steps_list: tuple[int, ...] | None = None  # of one with levels; null: 20, or a student's own
    guidance_scale: float | None = None  # null: 5, or none for a student
    seed: int = 0
    fps: int = 24

    def __post_init__(self):
        require(self.every > 0, f"every must be at least 1, got {self.every}")
        require(bool(self.prompts), "prompts must hold at least one; or leave validation out (null)")


@dataclass
class CheckpointConfig:
    """A checkpoint every `every` steps and at the end, the newest `keep` of them on disk."""

    folder: str | None = None  # null: `<run>/checkpoints`
    every: int = 500
    keep: int = 2

    def __post_init__(self):
        require(self.every > 0, f"every must be at least 1, got {self.every}")
        require(self.keep > 0, f"keep must be at least 1, got {self.keep}")


@dataclass
class ReconstructionConfig:
    """Weights of what the vae stage adds to the mean squared error of the pixels."""

    l1: float = 0.1  # mean absolute error
    edge: float = 0.5  # both errors of the differences between neighbouring pixels: sharp outlines
    kl: float = 1e-6
    first_frame: float = 1.0  # weight of a clip's first frame beside 1 for the others

    def __post_init__(self):
        for name, weight in dataclasses.asdict(self).items():
            require(weight >= 0, f"{name} must not be negative, got {weight}")


@dataclass
class PyramidConfig:
    """Stage 2: levels of growing size, from coarse to fine, each with its part of the path from noise to latents.

    `sample_ratios` is how many times of each level a step draws for every clip. "packed" runs all of them as one
    sequence (NaViT), "separate" one after the other, which needs less memory; the loss is the same.
    """

    sample_ratios: tuple[int, ...] = (1, 2, 1)
    levels: Literal["packed", "separate"] = "packed"
    stage_range: tuple[float, ...] = (0, 1 / 3, 2 / 3, 1)
    gamma: float = 1 / 3
    timestep_shift: float = 1.0

    def __post_init__(self):
        require(
            len(self.sample_ratios) > 1 and min(self.sample_ratios) > 0,
            f"sample_ratios must be at least two numbers from 1 up, one per level, got {self.sample_ratios}",
        )
        ends, count = tuple(self.stage_range), len(self.sample_ratios) + 1
        require(
            ends[:1] + ends[-1:] == (0, 1) and list(ends) == sorted(set(ends)) and len(ends) == count,
            f"stage_range must rise from 0 to 1 in {count} numbers, the ends of the levels, got {ends}",
        )
        require(0 < self.gamma <= 1 / 3 + 1e-9, f"gamma must be above 0 and at most 1/3, got {self.gamma}")
        require(self.timestep_shift > 0, f"timestep_shift must be above 0, got {self.timestep_shift}")

    def scheduler(self) -> SchedulerConfig:
        """The scheduler of a pipeline with this pyramid; it shifts times when it samples, by the size, exponentially
        (the authors' correction)."""
        return SchedulerConfig(
            stages=len(self.sample_ratios),
            stage_range=self.stage_range,
            gamma=self.gamma,
            shift=self.timestep_shift,
            use_dynamic_shifting=self.timestep_shift == 1.0,
        )


@dataclass
class FlowConfig:
    """The flow stage: memory, what is done to the history, the distribution of times, and for stage 2 the pyramid.

    `text_drop` is how often the caption is replaced by the empty one, which classifier-free guidance needs; released
    models start from one that knows it. `first_chunk` is the share of samples that are a video's first chunk, which
    alone learns from the text what it is to begin with; null: every chunk is as likely. `components` is a diffusers
    folder or hub name whose other parts (VAE, text encoder, tokenizer, scheduler) make the exported transformer a whole
    pipeline, and validation videos possible; null exports the transformer alone.
    """

    memory: MemoryConfig = field(default_factory=MemoryConfig)
    drop: DropConfig | None = field(default_factory=DropConfig)
    corruption: CorruptionConfig | None = field(default_factory=CorruptionConfig)
    times: TimesConfig = field(default_factory=TimesConfig)
    pyramid: PyramidConfig | None = None
    text_drop: float = 0.0
    first_chunk: float | None = None
    components: str | None = None

    def __post_init__(self):
        require(self.memory.anchor != "second", "memory.anchor must be first or null: second is for sampling only")
        require(0 <= self.text_drop < 1, f"text_drop must lie in [0, 1), got {self.text_drop}")
        require(
            self.first_chunk is None or 0 < self.first_chunk <= 1,
            f"first_chunk must be above 0 and at most 1, got {self.first_chunk}",
        )


@dataclass
class TrainConfig:
    """One training run. `run` is the folder for everything it writes."""

    stage: str = "flow"
    run: str = "runs/train"
    init: str | None = None  # a diffusers folder or hub name to start from; null: random weights
    init_subfolder: str = "transformer"  # of it, where it has subfolders; released: also transformer_init
    steps: int = 1000
    seed: int = 0
    log_every: int = 20
    precision: Literal["float32", "bfloat16"] = "bfloat16"  # of matrix products; parameters stay float32
    remat: Remat | None = None  # what of each block is not computed again in the backward pass; null: all of it
    # What is trained: "all", "adapters", and regular expressions of parameters and modules. The rest stays as it is, in
    # `precision`.
    trainable: tuple[str, ...] = ("all",)
    lora: LoRAConfig | None = None
    validation: ValidationConfig | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    distill: DistillConfig | None = None  # stage 3

    def __post_init__(self):
        require(self.steps > 0, f"steps must be at least 1, got {self.steps}")
        require(self.log_every > 0, f"log_every must be at least 1, got {self.log_every}")
        require(bool(self.run), "run must name a folder")
        require(self.seed >= 0, f"seed must not be negative, got {self.seed}")
        require(bool(self.trainable), "trainable must name something: all, adapters or parameters")
        require(
            self.lora is None or bool({"all", "adapters"} & set(self.trainable)),
            f"trainable must hold adapters when there is lora, got {list(self.trainable)}",
        )
        parts = self.optim.accumulate
        require(
            self.data.batch_size % parts == 0,
            f"data.batch_size {self.data.batch_size} must be a multiple of optim.accumulate {parts}",
        )
        if self.distill is not None:
            levels = 0 if self.flow.pyramid is None else len(self.flow.pyramid.sample_ratios)
            require(
                levels == len(self.distill.steps),
                f"distill.steps has {len(self.distill.steps)} levels, flow.pyramid {levels or 'is null'}: give as many",
            )
        require(
            (self.distill is not None) == (self.stage in ("ode", "distill")),
            f"distill must be given for the stages ode and distill and for no other, stage is {self.stage}",
        )
        names = stage_names()
        require(
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
