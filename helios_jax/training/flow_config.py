"""Configuration of the runs that train the transformer: memory, history, times, pyramid, adapters, the student's steps.

A module of its own avoids an import cycle: the stages import `start`, `validation` and `export`, which read this
configuration too.
"""

from dataclasses import dataclass, field
from typing import Literal

from helios_jax.config import require
from helios_jax.diffusion.corruption import CorruptionConfig, DropConfig
from helios_jax.diffusion.memory import MemoryConfig
from helios_jax.diffusion.schedule import SchedulerConfig, Shift
from helios_jax.diffusion.targets import TimesConfig
from helios_jax.locations import check_locations
from helios_jax.models.transformer.remat import Remat
from helios_jax.training.run_config import TrainConfig
from helios_jax.training.trainable import AdapterConfig


@dataclass
class PyramidConfig:
    """Stage 2: levels of growing size, from coarse to fine, each with its part of the path from noise to latents.

    `sample_ratios` is the number of noise times that a step draws at each level for every clip. With `levels`
    "packed", they all run as one sequence (NaViT); with "separate", one after the other, which needs less memory. The
    loss is the same.
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
        """The scheduler of a pipeline with this pyramid.

        It shifts times when it samples, by the size, exponentially (the authors' correction).
        """
        return SchedulerConfig(
            stages=len(self.sample_ratios),
            stage_range=self.stage_range,
            gamma=self.gamma,
            shift=self.timestep_shift,
            use_dynamic_shifting=self.timestep_shift == 1.0,
        )


@dataclass
class FlowConfig:
    """Flow matching: memory, damage to the history, the distribution of times, and for stage 2 the pyramid.

    `text_drop` is how often the caption is replaced by the empty one, which classifier-free guidance needs (0: the
    released models start from weights that know the empty caption). `first_chunk` is the share of samples that are a
    video's first chunk, the only one that learns to begin from text alone; null: all chunks are equally likely.
    `components` is a diffusers folder or hub name whose other parts (VAE, text encoder, tokenizer, scheduler) make the
    exported transformer a whole pipeline, and validation videos possible; null exports the transformer alone.
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
        check_locations(components=self.components)
        require(0 <= self.text_drop < 1, f"text_drop must lie in [0, 1), got {self.text_drop}")
        require(
            self.first_chunk is None or 0 < self.first_chunk <= 1,
            f"first_chunk must be above 0 and at most 1, got {self.first_chunk}",
        )
        require(
            self.corruption is None or not self.corruption.is_nothing,
            "corruption: without noise, blur and saturation it changes nothing; give one of them, or set it to null",
        )


@dataclass
class FlowTrainConfig(TrainConfig):
    """Settings of a run that trains the transformer: all of stages 1 and 2; stage 3 adds more."""

    init_subfolder: str = "transformer"  # of init, where it has subfolders; released: also transformer_init
    remat: Remat | None = None  # activations of each block that are kept for the backward pass; null: all of them
    unroll: bool = False  # no loop over the blocks: faster steps of small models on CPU, a longer compilation
    lora: AdapterConfig | None = None
    flow: FlowConfig = field(default_factory=FlowConfig)

    def __post_init__(self):
        super().__post_init__()
        require(
            self.lora is None or bool({"all", "adapters"} & set(self.trainable)),
            f"trainable must hold adapters when there is lora, got {list(self.trainable)}",
        )


@dataclass
class StudentConfig:
    """Stage 3: the student of few steps.

    `steps` are the denoising steps of each level; `amplify_first_chunk` doubles them in a video's first chunk. `shift`
    is the dynamic shift of all times. `ode_weight` is the factor of the ODE stage's loss. Memory, history, pyramid and
    components are set in `flow`.
    """

    steps: tuple[int, ...] = (2, 2, 2)
    amplify_first_chunk: bool = True
    shift: Shift = "linear"
    ode_weight: float = 80.0

    def __post_init__(self):
        require(
            len(self.steps) > 1 and min(self.steps) > 0,
            f"steps must be at least two numbers from 1 up, one per level, got {self.steps}",
        )
        require(self.ode_weight > 0, f"ode_weight must be above 0, got {self.ode_weight}")


@dataclass
class StudentTrainConfig(FlowTrainConfig):
    """A run of stage 3."""

    distill: StudentConfig = field(default_factory=StudentConfig)

    def __post_init__(self):
        super().__post_init__()
        steps = len(self.distill.steps)
        levels = 0 if self.flow.pyramid is None else len(self.flow.pyramid.sample_ratios)
        require(
            levels == steps,
            f"distill.steps has {steps} levels, flow.pyramid {levels or 'is null'}: give as many",
        )
        ones = [1] * levels
        require(
            self.flow.pyramid is None or list(self.flow.pyramid.sample_ratios) == ones,
            f"flow.pyramid.sample_ratios must be {ones}: a student has one sample of each level",
        )
        shift = 1.0 if self.flow.pyramid is None else self.flow.pyramid.timestep_shift
        require(
            self.distill.shift is None or shift == 1.0,
            f"distill.shift {self.distill.shift} replaces flow.pyramid.timestep_shift {shift}: set shift to null",
        )

    @property
    def pyramid(self) -> PyramidConfig:
        """`flow.pyramid`, which a student always has."""
        assert self.flow.pyramid is not None  # it has as many levels as distill.steps
        return self.flow.pyramid
