"""Configuration of the runs that train the transformer: memory, history, times, pyramid, adapters, the student's steps.

Each stage has classes of its own, with the fields that it reads: a key of another stage is an unknown key. A module of
its own avoids an import cycle: the stages import `start`, `validation` and `export`, which read this configuration too.
"""

# pyright: reportIncompatibleVariableOverride=false
# Subclasses narrow the types of parts. That is safe: a run never replaces a part of its config.

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
    """Levels of growing size, from coarse to fine, each with its part of the path from noise to latents.

    `stage_range` has the ends of the parts. Without more settings, a step samples each level once, in its own pass.
    """

    stage_range: tuple[float, ...] = (0, 1 / 3, 2 / 3, 1)
    gamma: float = 1 / 3
    timestep_shift: float = 1.0

    def __post_init__(self):
        ends = tuple(self.stage_range)
        require(
            ends[:1] + ends[-1:] == (0, 1) and list(ends) == sorted(set(ends)) and len(ends) > 2,
            f"stage_range must rise from 0 to 1 in at least three numbers, the ends of the levels, got {ends}",
        )
        require(0 < self.gamma <= 1 / 3 + 1e-9, f"gamma must be above 0 and at most 1/3, got {self.gamma}")
        require(self.timestep_shift > 0, f"timestep_shift must be above 0, got {self.timestep_shift}")

    @property
    def num_levels(self) -> int:
        """Number of levels."""
        return len(self.stage_range) - 1

    def samples(self) -> list[int]:
        """The level of each sample that a step trains on for a clip."""
        return list(range(self.num_levels))

    @property
    def left_out(self) -> tuple[int, ...]:
        """The levels that a step does not train on."""
        return tuple(level for level in range(self.num_levels) if level not in self.samples())

    def passes(self) -> list[list[int]]:
        """The levels of `samples` by forward passes of the transformer."""
        return [[level] for level in self.samples()]

    def scheduler(self) -> SchedulerConfig:
        """The scheduler of a pipeline with this pyramid.

        It shifts times when it samples, by the size, exponentially (the authors' correction).
        """
        return SchedulerConfig(
            stages=self.num_levels,
            stage_range=self.stage_range,
            gamma=self.gamma,
            shift=self.timestep_shift,
            use_dynamic_shifting=self.timestep_shift == 1.0,
        )


@dataclass
class PackedPyramidConfig(PyramidConfig):
    """A pyramid whose levels may share a forward pass.

    With `levels` "packed", they all run as one sequence (NaViT); with "separate", one after the other, which needs less
    memory. The loss is the same.
    """

    levels: Literal["packed", "separate"] = "packed"

    def passes(self) -> list[list[int]]:
        """The levels of `samples` by forward passes: one for all, or one for each."""
        return [self.samples()] if self.levels == "packed" else super().passes()


@dataclass
class FlowPyramidConfig(PackedPyramidConfig):
    """Stage 2: `sample_ratios` is the number of noise times that a step draws at each level for every clip.

    A level of 0 is left to another run: the coarsest level alone, say, which has the fewest tokens, and then all.
    """

    sample_ratios: tuple[int, ...] = (1, 2, 1)

    def __post_init__(self):
        super().__post_init__()
        require(
            min(self.sample_ratios, default=0) >= 0 and any(self.sample_ratios),
            f"sample_ratios must be numbers from 0 up, one per level and not all 0, got {self.sample_ratios}",
        )
        require(
            len(self.sample_ratios) == self.num_levels,
            f"stage_range must have {len(self.sample_ratios) + 1} numbers, the ends of the levels of sample_ratios "
            f"{self.sample_ratios}, got {self.stage_range}",
        )

    def samples(self) -> list[int]:
        """The level of each sample that a step trains on for a clip."""
        return [level for level, ratio in enumerate(self.sample_ratios) for _ in range(ratio)]


@dataclass
class TransformerFlowConfig:
    """Settings under `flow` of every stage that trains the transformer.

    `components` is a diffusers folder or hub name whose other parts (VAE, text encoder, tokenizer, scheduler) make the
    exported transformer a whole pipeline, and validation videos possible; null exports the transformer alone.
    """

    memory: MemoryConfig = field(default_factory=MemoryConfig)
    components: str | None = None

    def __post_init__(self):
        require(self.memory.anchor != "second", "memory.anchor must be first or null: second is for sampling only")
        check_locations(components=self.components)


@dataclass
class ClipFlowConfig(TransformerFlowConfig):
    """Settings of a stage that cuts chunks and their history out of clips: damage to the history, choice of the chunks.

    `text_drop` is how often the caption is replaced by the empty one, which classifier-free guidance needs (0: the
    released models start from weights that know the empty caption). `first_chunk` is the share of samples that are a
    video's first chunk, the only one that learns to begin from text alone; null: all chunks are equally likely.
    """

    drop: DropConfig | None = field(default_factory=DropConfig)
    corruption: CorruptionConfig | None = field(default_factory=CorruptionConfig)
    text_drop: float = 0.0
    first_chunk: float | None = None

    def __post_init__(self):
        super().__post_init__()
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
class FlowConfig(ClipFlowConfig):
    """Stages 1 and 2, flow matching: the distribution of times, and for stage 2 the pyramid."""

    times: TimesConfig = field(default_factory=TimesConfig)
    pyramid: FlowPyramidConfig | None = None


@dataclass
class StudentFlowConfig(TransformerFlowConfig):
    """Stage 3: a student always has a pyramid, and one sample of each of its levels."""

    pyramid: PyramidConfig = field(default_factory=PyramidConfig)


@dataclass
class TransformerTrainConfig(TrainConfig):
    """Settings of every run that trains the transformer; each stage narrows `flow` to the keys that it reads."""

    init_subfolder: str = "transformer"  # of init, where it has subfolders; released: also transformer_init
    remat: Remat | None = None  # activations of each block that are kept for the backward pass; null: all of them
    unroll: bool = False  # no loop over the blocks: faster steps of small models on CPU, a longer compilation
    lora: AdapterConfig | None = None
    flow: TransformerFlowConfig = field(default_factory=TransformerFlowConfig)

    def __post_init__(self):
        super().__post_init__()
        require(
            self.lora is None or bool({"all", "adapters"} & set(self.trainable)),
            f"trainable must hold adapters when there is lora, got {list(self.trainable)}",
        )

    @property
    def pyramid(self) -> PyramidConfig | None:
        """The levels of the run; None without."""
        return None


@dataclass
class FlowTrainConfig(TransformerTrainConfig):
    """A run of stage 1 or 2."""

    flow: FlowConfig = field(default_factory=FlowConfig)

    @property
    def pyramid(self) -> FlowPyramidConfig | None:
        """`flow.pyramid`, which stage 2 has."""
        return self.flow.pyramid


@dataclass
class StudentConfig:
    """Stage 3: the student of few steps.

    `steps` are the denoising steps of each level; `amplify_first_chunk` doubles them in a video's first chunk. `shift`
    is the dynamic shift of all times. Memory, history, pyramid and components are set in `flow`.
    """

    steps: tuple[int, ...] = (2, 2, 2)
    amplify_first_chunk: bool = True
    shift: Shift = "linear"

    def __post_init__(self):
        require(
            len(self.steps) > 1 and min(self.steps) > 0,
            f"steps must be at least two numbers from 1 up, one per level, got {self.steps}",
        )


@dataclass
class StudentTrainConfig(TransformerTrainConfig):
    """A run of stage 3."""

    flow: StudentFlowConfig = field(default_factory=StudentFlowConfig)
    distill: StudentConfig = field(default_factory=StudentConfig)

    def __post_init__(self):
        super().__post_init__()
        steps, levels, shift = self.distill.steps, self.pyramid.num_levels, self.pyramid.timestep_shift
        require(
            levels == len(steps),
            f"distill.steps {list(steps)} are of {len(steps)} levels, flow.pyramid.stage_range of {levels}: give as "
            "many",
        )
        require(
            self.distill.shift is None or shift == 1.0,
            f"distill.shift {self.distill.shift} replaces flow.pyramid.timestep_shift {shift}: set shift to null",
        )

    @property
    def pyramid(self) -> PyramidConfig:
        """`flow.pyramid`, which a student always has."""
        return self.flow.pyramid
