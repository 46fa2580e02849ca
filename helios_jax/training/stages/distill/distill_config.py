"""Configuration of stage 3, second part: scores, discriminator, and the chunks that the student makes in a row."""

# pyright: reportIncompatibleVariableOverride=false
# A run never replaces a part of its config, so narrower types are safe.

from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from helios_jax.config import require
from helios_jax.diffusion.distillation import PenaltyConfig, RenoiseConfig
from helios_jax.locations import check_locations
from helios_jax.models.discriminator import DiscriminatorConfig
from helios_jax.training.flow_config import ClipFlowConfig, StudentConfig, StudentFlowConfig, StudentTrainConfig
from helios_jax.training.optim import OptimConfig
from helios_jax.training.trainable import AdapterConfig


@dataclass
class ScoreConfig:
    """The teacher whose distribution the student is to match, frozen (upstream's real score: Base).

    `init` is a diffusers folder or hub name. The critic (fake score) is the same weights with adapters, so the two cost
    one model. With `init` null they are also the weights under the generator's adapters, so that generator, real and
    fake score cost one: the run then needs `lora`, and its own `init` must be the teacher. `adapters` are LoRA files or
    folders that make the student out of that teacher, such as the `lora` of the stages between them: they stay as they
    are beside the new ones.
    """

    init: str | None = None
    init_subfolder: str = "transformer"
    adapters: tuple[str, ...] = ()
    # Scale s of the teacher's guidance, caption + s * (caption - negative); 0: no pass with the negative prompt.
    guidance_scale: float = 3.0
    renoise: RenoiseConfig = field(default_factory=lambda: RenoiseConfig(distribution="beta"))

    def __post_init__(self):
        check_locations(init=self.init)
        for text in self.adapters:
            check_locations(adapters=text)
        require(
            self.init is None or not self.adapters,
            "adapters must be empty where init names the teacher: they make the student out of the run's own init",
        )


@dataclass
class CriticConfig:
    """The fake score: it learns the generator's chunks by flow matching, with an optimiser of its own.

    The discriminator is trained by the same optimiser; the two are clipped by the norm of their gradients together.
    It takes every step, the generator every `steps_per_generator`-th.
    """

    lora: AdapterConfig = field(default_factory=lambda: AdapterConfig(rank=256))
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=4e-7, betas=(0.0, 0.999), weight_decay=1e-3, clip_norm=1.0)
    )
    steps_per_generator: int = 5
    renoise: RenoiseConfig = field(default_factory=RenoiseConfig)

    def __post_init__(self):
        require(self.steps_per_generator > 0, f"steps_per_generator must be at least 1, got {self.steps_per_generator}")
        require(
            self.optim.ema is None and self.optim.accumulate == 1 and self.optim.offload is None,
            "optim: ema, accumulate and offload are those of the run, set them in optim",
        )


@dataclass
class GANConfig:
    """A discriminator on the fake score's features, from step `start`.

    `generator_weight` and `critic_weight` are the factors of the two losses, `r1` and `r2` the penalties at real and at
    generated latents, `crop` the share of height and width that it sees (null: all). `renoise` is the noise on what it
    sees; null: that of the critic, and of the teacher for the generator, as upstream.
    """

    start: int = 1000
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    generator_weight: float = 5e-2
    critic_weight: float = 1e-2
    r1: PenaltyConfig | None = field(default_factory=PenaltyConfig)
    r2: PenaltyConfig | None = None
    crop: float | None = 0.5
    renoise: RenoiseConfig | None = None

    def __post_init__(self):
        require(self.start >= 0, f"start must not be negative, got {self.start}")
        require(
            min(self.generator_weight, self.critic_weight) >= 0,
            f"weights must not be negative, got {self.generator_weight} and {self.critic_weight}",
        )
        require(self.crop is None or 0 < self.crop < 1, f"crop must lie between 0 and 1, or be null, got {self.crop}")


@dataclass(unsafe_hash=True)
class RolloutConfig:
    """Numbers of chunks that the student makes in a row, the scored one included (self-forcing).

    A number is drawn uniformly from `smallest` to `largest`. With a cold start, the first `cold_start` steps take
    `smallest` instead, or one more from step `warm_start` on (upstream's dmd_num_latent_sections_*, cold_start_step,
    stage_cold_start_step). The first chunk follows the data's history.
    """

    smallest: int = 1
    largest: int = 1
    cold_start: int = 0
    warm_start: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.smallest <= self.largest:
            raise ValueError(f"smallest must be at least 1 and at most largest ({self.largest}), got {self.smallest}")
        if self.warm_start is not None and not (self.warm_start <= self.cold_start and self.smallest < self.largest):
            raise ValueError(
                f"warm_start {self.warm_start} must come before cold_start {self.cold_start}, and largest must be above"
                f" smallest: it takes one chunk more"
            )

    def draw(self, key: Key[Array, ""], step: Int[Array, ""]) -> Int[Array, ""]:
        """The number of chunks of a training step, the same for all samples."""
        drawn = jax.random.randint(key, (), self.smallest, self.largest + 1)
        cold = jnp.asarray(self.smallest)
        if self.warm_start is not None:
            cold = cold + (step >= self.warm_start)
        return jnp.where(step < self.cold_start, cold, drawn)


@dataclass
class DistillConfig(StudentConfig):
    """Stage 3, second part: the student's steps, the scores, and a discriminator if there is one.

    `matching_weight` is the factor of the loss of distribution matching. With 0 the discriminator alone teaches the
    student, and no score judges its chunks.
    """

    matching_weight: float = 1.0
    score: ScoreConfig = field(default_factory=ScoreConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    gan: GANConfig | None = None
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    negative_text: Literal["negative", "empty"] = "negative"  # embedding in the data that guidance leads away from

    def __post_init__(self):
        super().__post_init__()
        require(self.matching_weight >= 0, f"matching_weight must not be negative, got {self.matching_weight}")
        require(
            self.matching_weight > 0 or self.gan is not None,
            "matching_weight is 0 and gan null: nothing would teach the student; give one of them",
        )


@dataclass
class DistillFlowConfig(ClipFlowConfig, StudentFlowConfig):
    """Settings under `flow`: chunks of clips, and the student's pyramid."""


@dataclass
class DistillTrainConfig(StudentTrainConfig):
    """A run of stage 3, second part."""

    stage: str = "distill"
    flow: DistillFlowConfig = field(default_factory=DistillFlowConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)

    def __post_init__(self):
        super().__post_init__()
        require(
            self.optim.offload is None or self.distill.critic.optim.name != "prodigy",
            "optim.offload must be null where distill.critic.optim is prodigy, whose step needs all state at once",
        )
