"""Configuration of stage 3: the part of a run's config that `ode` and `distill` read."""

from dataclasses import dataclass, field
from typing import Literal

from helios_jax.config import require
from helios_jax.diffusion.distillation import PenaltyConfig, RenoiseConfig
from helios_jax.diffusion.exits import RolloutConfig
from helios_jax.models.discriminator import DiscriminatorConfig
from helios_jax.training.optim import OptimConfig
from helios_jax.training.trainable import LoRAConfig


@dataclass
class ScoreConfig:
    """Stage 3: the teacher whose distribution the student is to match, frozen (upstream's real score: Base).

    `init` is a diffusers folder or hub name. The critic (fake score) is the same weights with adapters, so the two cost
    one model; with `init` null they are also the weights that the generator's adapters stand on, so that generator,
    real and fake score cost one: the generator then has to be adapters (`lora`), on a model that is the teacher.
    `adapters` are LoRA files or folders that make the student out of that teacher, such as the `lora` of the stages
    between them: they stay as they are beside the new ones.
    """

    init: str | None = None
    init_subfolder: str = "transformer"
    adapters: tuple[str, ...] = ()
    guidance_scale: float = (
        3.0  # how far the teacher goes beyond the caption, from the negative prompt; 0: no such pass
    )
    renoise: RenoiseConfig = field(default_factory=lambda: RenoiseConfig(distribution="beta"))

    def __post_init__(self):
        require(
            self.init is None or not self.adapters,
            "adapters must be empty where init names the teacher: they make the student out of the run's own init",
        )


@dataclass
class CriticConfig:
    """Stage 3: the fake score, which learns by flow matching what the generator makes, with an optimiser of its own.

    It takes every step, the generator every `steps_per_generator`-th.
    """

    lora: LoRAConfig = field(default_factory=lambda: LoRAConfig(rank=256))
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=4e-7, betas=(0.0, 0.999), weight_decay=1e-3, clip_norm=10.0)
    )
    steps_per_generator: int = 5
    renoise: RenoiseConfig = field(default_factory=RenoiseConfig)

    def __post_init__(self):
        require(self.steps_per_generator > 0, f"steps_per_generator must be at least 1, got {self.steps_per_generator}")
        require(
            self.optim.ema is None and self.optim.accumulate == 1,
            "optim: ema and accumulate are those of the run, set optim.ema and optim.accumulate",
        )


@dataclass
class GANConfig:
    """Stage 3: a discriminator on the fake score's features, from step `start`.

    `generator_weight` and `critic_weight` are those of the two losses, `r1` and `r2` the penalties at real and at made
    latents, `crop` the share of height and width that it sees (null: all).
    """

    start: int = 1000
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    generator_weight: float = 5e-2
    critic_weight: float = 1e-2
    r1: PenaltyConfig | None = field(default_factory=PenaltyConfig)
    r2: PenaltyConfig | None = None
    crop: float | None = 0.5

    def __post_init__(self):
        require(self.start >= 0, f"start must not be negative, got {self.start}")
        require(
            min(self.generator_weight, self.critic_weight) >= 0,
            f"weights must not be negative, got {self.generator_weight} and {self.critic_weight}",
        )
        require(self.crop is None or 0 < self.crop < 1, f"crop must lie between 0 and 1, or be null, got {self.crop}")


@dataclass
class DistillConfig:
    """Stage 3, `ode` and `distill`: the student of few steps.

    `steps` are those of each level, twice as many in a video's first chunk with `amplify_first_chunk`; `shift` is the
    dynamic shift of all times. The `ode` stage has `ode_weight` before its loss; what is null there, `distill` needs:
    the scores, and a discriminator if there is to be one. Memory, history, pyramid and components are those of `flow`.
    """

    steps: tuple[int, ...] = (2, 2, 2)
    amplify_first_chunk: bool = True
    shift: Literal["linear", "exponential"] | None = "linear"
    ode_weight: float = 80.0
    score: ScoreConfig = field(default_factory=ScoreConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    gan: GANConfig | None = None
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    negative_text: Literal["negative", "empty"] = "negative"  # which of the embeddings in the data guidance leads from

    def __post_init__(self):
        require(
            len(self.steps) > 1 and min(self.steps) > 0,
            f"steps must be at least two numbers from 1 up, one per level, got {self.steps}",
        )
        require(self.ode_weight > 0, f"ode_weight must be above 0, got {self.ode_weight}")
