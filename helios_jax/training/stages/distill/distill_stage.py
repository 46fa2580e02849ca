"""Stage 3, second part: a student of few steps whose videos are distributed as the teacher's (paper section 3.5).

The student (generator) makes a chunk after real history. The teacher (real score) and the critic (fake score) give the
direction in which it should move, and the critic follows the student's chunks; a discriminator on the critic's features
tells them from real latents. Batches are those of `stages.flow`, with `negative` [b, m, d], the text that guidance
leads away from, and `target` as many chunks as a rollout may have.

`distill_config` has the settings, `players` the networks, `rollout` the student's chunks, `player_losses` the losses.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from helios_jax import lora
from helios_jax.config import ConfigError
from helios_jax.data.records import EMPTY_TEXT, NEGATIVE_TEXT, Source
from helios_jax.models.discriminator import Head
from helios_jax.models.transformer import Transformer
from helios_jax.pretrained import CheckpointError
from helios_jax.runtime import seeds
from helios_jax.trained import Trained, differences, with_loras
from helios_jax.training import optim
from helios_jax.training.export import export_pipeline
from helios_jax.training.lineage import check_levels, check_memory
from helios_jax.training.stage import Batches, Metrics, Player, Stage
from helios_jax.training.stages import flow
from helios_jax.training.stages.distill import players
from helios_jax.training.stages.distill.distill_config import DistillTrainConfig, GANConfig
from helios_jax.training.stages.distill.player_losses import Turn, critic_loss, generator_loss
from helios_jax.training.stages.distill.players import Players, of_student
from helios_jax.training.stages.distill.rollout import make_inputs
from helios_jax.training.stages.flow import fold
from helios_jax.training.start import transformer_config
from helios_jax.training.trainable import ALL
from helios_jax.training.training_data import one_of_each
from helios_jax.training.validation import Videos
from helios_jax.training.work import tokens

COMMON = 2**31 - 1  # not the number of any step: the loop folds step numbers into the same seed


class DistillStage(Stage[DistillTrainConfig, Players]):
    """Distribution matching distillation, with a discriminator where `distill.gan` asks."""

    Config = DistillTrainConfig

    def init(self, key: Key[Array, ""]) -> Players:
        """All players with random weights."""
        return players.init(self.config, key)

    def load(self, model: Players, shardings: Any = None) -> Players:
        """The generator from `config.init`, the scores from `distill.score.init`."""
        return players.load(self.config, model, shardings)

    def batches(self, mesh: Mesh) -> Batches:
        """Batches of `stages.flow`, with the negative text, and as many chunks as a rollout may have.

        Raises ConfigError for data or components that are not there or do not fit.
        """
        config, distill = self.config, self.config.distill
        check_players(config)
        source = flow.open_latents(config, distill.rollout.largest)
        if distill.gan is not None:
            check_discriminator(config, distill.gan, source)
        name = {"negative": NEGATIVE_TEXT, "empty": EMPTY_TEXT}[distill.negative_text]
        return flow.chunks(config.data, config.flow, source, mesh, distill.rollout.largest, name)

    def tokens(self, batch: dict[str, Any]) -> int:
        """Noisy and history tokens of the student's levels."""
        return tokens(self.config, batch)

    def make_optimizer(self) -> optax.GradientTransformation:
        """One optimizer for the generator, on every `critic.steps_per_generator`-th step, and one for the rest."""
        config, critic = self.config, self.config.distill.critic
        every = critic.steps_per_generator
        generator = optim.make_optimizer(config.optim, self._turns)

        def player(params: Any) -> Any:
            return nnx.map_state(lambda path, x: "generator" if of_student(path, x) else "critic", params)

        return optax.partition(
            {
                "generator": optim.on_turns(generator, every),
                "critic": optim.make_optimizer(critic.optim, config.steps),
            },
            player,
        )

    @property
    def _turns(self) -> int:
        """Steps of the generator in the whole run."""
        return math.ceil(self.config.steps / self.config.distill.critic.steps_per_generator)

    def learning_rates(self, step: int) -> Mapping[str, float]:
        """The rate of the generator at its last turn up to `step`, and that of the critic and the discriminator."""
        critic = self.config.distill.critic
        turn = step // critic.steps_per_generator
        return {
            "lr": optim.rate_at(self.config.optim, self._turns, turn),
            "lr_critic": optim.rate_at(critic.optim, self.config.steps, step),
        }

    def players(self) -> Sequence[Player]:
        """The generator, then the critic with the discriminator."""
        every = self.config.distill.critic.steps_per_generator
        return (
            Player(partial(self._play, generator_loss, 2), of_student, every),
            Player(partial(self._play, critic_loss, 1), lambda path, x: not of_student(path, x)),
        )

    def _play(
        self, loss: Any, number: int, model: Players, batch: dict[str, Any], keys: Key[Array, " b"]
    ) -> tuple[Float[Array, ""], Metrics]:
        """The loss of a player; its `number` makes its draws differ from those of the other player."""
        config, step = self.config, batch["step"]
        inputs = make_inputs(batch, fold(keys, 0), config)
        # All samples share one rollout length: with several, a batch would take as long as the longest.
        common = jax.random.fold_in(jax.random.fold_in(seeds.key(config.seed), COMMON), step)
        chunks = config.distill.rollout.draw(jax.random.fold_in(common, 0), step)
        turn = Turn(inputs, chunks, fold(keys, 1 + number), jax.random.fold_in(common, number), step)
        return loss(model, turn, config)

    def export(self, model: Players, folder: Path) -> None:
        """Writes the student's pipeline; critic and discriminator are in the checkpoints."""
        export_pipeline(model.student, self.config, folder)

    @cached_property
    def videos(self) -> Videos:
        """The videos of validation."""
        return Videos(self.config)

    def validate(self, model: Players, folder: Path, stop: Callable[[], bool]) -> Mapping[str, np.ndarray]:
        """Writes the student's videos into `folder`; returns their frames."""
        return self.videos.make(model.student, folder, stop)


def check_players(config: DistillTrainConfig) -> None:
    """Raises ConfigError for players that do not fit one another."""
    distill, own = config.distill, transformer_config(config)
    check_memory(config)
    if distill.score.init is None:
        if config.lora is None:
            raise ConfigError(
                "distill.score.init: name the teacher's weights; without, the generator's serve, and it needs lora"
            )
        scores = own
        try:
            files = {file: lora.read(file) for file in distill.score.adapters}
            lora.check(Transformer.abstract(own, stacked=True), files)
            ours = Trained(config.flow.memory)
            metadata = {file: made.metadata for file, made in files.items()}
            theirs = with_loras(ours, metadata, kind=None)
            if theirs.memory != ours.memory:
                differ = differences(theirs.memory, ours.memory)
                raise CheckpointError(f"were trained with another flow.memory than this run's: {differ}")
        except CheckpointError as error:
            raise ConfigError(f"distill.score.adapters: {error}") from None
        check_levels(config, metadata)
    else:
        scores = players.score_sizes(config)
        for name in ("patch_size", "in_channels", "out_channels", "text_dim"):
            if getattr(own, name) != (theirs := getattr(scores, name)):
                raise ConfigError(f"distill.score.init: its {name} is {theirs}, the generator's {getattr(own, name)}")
        check_levels(config)
        check_memory(players.score_config(config), "distill.score.init")
    if (average := config.optim.ema) is not None and average.every != distill.critic.steps_per_generator:
        raise ConfigError(
            f"optim.ema.every is {average.every}: set it to distill.critic.steps_per_generator, "
            f"{distill.critic.steps_per_generator}, so that the average moves when the generator does"
        )


def check_discriminator(config: DistillTrainConfig, gan: GANConfig, source: Source) -> None:
    """Raises ConfigError for a discriminator that is not trained, or that fits neither the scores nor the latents."""
    scores = transformer_config(config) if config.distill.score.init is None else players.score_sizes(config)
    if not {ALL, "discriminator"} & set(config.trainable):
        raise ConfigError(
            f"trainable: {list(config.trainable)} leaves the discriminator as it began; name it too, or set "
            "distill.gan to null"
        )
    blocks, count = gan.discriminator.blocks, scores.num_layers
    if max(blocks, default=0) >= count:
        raise ConfigError(f"distill.gan.discriminator.blocks: {blocks}, but the scores have blocks 0 to {count - 1}")
    crop = gan.crop or 1
    for latents in (example["latents"].shape[1:-1] for example in one_of_each(source)):
        seen = (latents[0], *(int(n * crop) for n in latents[1:]))
        for axis, (name, size, patch) in enumerate(zip(("frames", "high", "wide"), seen, scores.patch_size)):
            least = Head.smallest(axis) * (patch if blocks else 1)
            if size < least or size % patch:
                raise ConfigError(
                    f"distill.gan: the discriminator would see latents {size} {name}, it needs {least} or more in "
                    f"patches of {patch}; set distill.gan.crop to null, or use larger videos"
                )
