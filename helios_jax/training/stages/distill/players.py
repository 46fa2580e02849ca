"""Networks of stage 3: generator, scores, discriminator, and where their weights come from."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from helios_jax import lora
from helios_jax.config import ConfigError
from helios_jax.models.discriminator import Discriminator
from helios_jax.models.transformer import Transformer, TransformerConfig
from helios_jax.runtime import seeds
from helios_jax.sharding import shardings as placements
from helios_jax.training import start
from helios_jax.training.flow_config import TransformerTrainConfig
from helios_jax.training.run_config import ModelConfig
from helios_jax.training.stages.distill.distill_config import DistillTrainConfig
from helios_jax.training.trainable import ADAPTERS, dotted, trainable

CRITIC = "critic"  # the name of the fake score's adapters


class CriticWeight(lora.LoRAWeight):
    """A matrix of the fake score's adapters, which may stand on the generator's weights."""


def of_student(path: tuple[Any, ...], variable: Any) -> bool:
    """The filter of the student's parameters; all others belong to the scores and the discriminator."""
    return path[0] == "generator" and not isinstance(variable, CriticWeight)


class Players(nnx.Module):
    """The generator, the scores' transformer and the discriminator; the last two may be None.

    Real and fake score share one set of weights, to which the fake score adds the adapters `critic`. Without `score`
    both use the generator's base weights. The generator then has adapters of its own: the trained ones, and the frozen
    ones that turned the teacher into the student before.
    """

    FLOAT32 = Transformer.FLOAT32
    AVERAGED = staticmethod(of_student)

    def __init__(self, generator: Transformer, score: Transformer | None, discriminator: Discriminator | None):
        self.generator, self.score, self.discriminator = generator, score, discriminator

    @property
    def student(self) -> Transformer:
        """The generator: the model of few steps."""
        return self.generator if self.score is not None else lora.remove(self.generator, CRITIC)

    @property
    def fake(self) -> Transformer:
        """The critic: the fake score, which models the distribution of the student's chunks."""
        if self.score is not None:
            return self.score
        model = self.generator
        for name in lora.names(model):
            model = model if name == CRITIC else lora.remove(model, name)
        return model

    @property
    def real(self) -> Transformer:
        """The teacher: the real score."""
        return lora.remove(self.fake)


def score_config(config: DistillTrainConfig) -> TransformerTrainConfig:
    """The config of a run that trains the critic alone, from which `training.start` makes or loads the scores."""
    score = config.distill.score
    return dataclasses.replace(
        config, init=score.init, init_subfolder=score.init_subfolder, lora=None, trainable=("all",), model=ModelConfig()
    )


def score_sizes(config: DistillTrainConfig) -> TransformerConfig:
    """The sizes of the scores that `distill.score.init` names. Raises what `start.transformer_config` does."""
    return start.transformer_config(score_config(config), "distill.score.init")


def _attach(model: Transformer, config: DistillTrainConfig, *, empty: bool = False) -> Transformer:
    """`model` with the frozen adapters that turn the teacher into the student, named before_0, before_1 and so on."""
    for name, file in _adapters(config).items():
        model = lora.freeze(lora.attach(model, {name: file}, dtype=config.precision, empty=empty), name)
    return model


def _adapters(config: DistillTrainConfig) -> dict[str, str]:
    return {f"before_{i}": file for i, file in enumerate(config.distill.score.adapters)}


def _add_critic(model: Transformer, config: DistillTrainConfig) -> Transformer:
    asked = config.distill.critic.lora
    adapter = lora.LoRAConfig(asked.rank, asked.alpha, asked.target_modules, init="gaussian", name=CRITIC)
    try:
        model = lora.add(model, adapter, jax.random.fold_in(seeds.key(config.seed), 2), dtype=jnp.float32)
    except ValueError as error:
        raise ConfigError(f"distill.critic.lora: {error}") from None
    return lora.adapters.set_kind(model, CRITIC, CriticWeight)


def _discriminator(config: DistillTrainConfig, model: Transformer) -> Discriminator | None:
    if config.distill.gan is None:
        return None
    sizes, key = model.config, jax.random.fold_in(seeds.key(config.seed), 3)
    return Discriminator(
        config.distill.gan.discriminator, sizes.dim, sizes.out_channels or sizes.in_channels, rngs=nnx.Rngs(key)
    )


def init(config: DistillTrainConfig, key: jax.Array) -> Players:
    """All players with random weights; new adapters begin as in `load`, adapters from files are zeros.

    Raises ConfigError where `trainable` names the teacher's weights, or leaves out the critic's.
    """
    generator, score = start.init_transformer(config, key), None
    judge = generator
    if config.distill.score.init is None:
        generator = _add_critic(_attach(generator, config, empty=True), config)
    else:
        judge = start.init_transformer(score_config(config), jax.random.fold_in(key, 1))
        score = _add_critic(judge, config)
    made = Players(generator, score, _discriminator(config, judge))
    _check_trained(made, config.trainable)
    return made


def _check_trained(model: Players, names: Sequence[str]) -> None:
    """Raises ConfigError where the parameters `names` are the teacher's, or none of them is the critic's."""
    trained, _ = nnx.state(model, trainable(names), ...)
    found = nnx.to_flat_state(trained)
    teacher, student = ("generator", ADAPTERS) if model.score is None else ("score", f"generator, {ADAPTERS}")
    for path, variable in found:
        if path[0] == teacher and not isinstance(variable, lora.LoRAWeight):
            raise ConfigError(
                f"trainable: {list(names)} would train {dotted(path)}, a weight of the teacher, which stays as it is; "
                f"name {student} and, with distill.gan, discriminator"
            )
    if not any(isinstance(variable, CriticWeight) for _, variable in found):
        raise ConfigError(f"trainable: {list(names)} leaves the critic as it began; name {ADAPTERS}, too")


def load(config: DistillTrainConfig, model: Players, shardings: Any = None) -> Players:
    """The abstract `model` of `init` with the generator from `config.init` and the scores from `distill.score.init`.

    Raises CheckpointError when the files do not fit.
    """

    def base(config: TransformerTrainConfig, model: Transformer) -> Transformer:
        placed = None
        if shardings is not None:
            placed = placements(model, jax.tree.leaves(shardings)[0].mesh)
        return start.load_transformer(config, model, placed)

    def placed(name: str) -> Any:
        return None if shardings is None else getattr(shardings, name)

    def with_critic(loaded: Transformer, name: str) -> Transformer:
        add = jax.jit(lambda x: _add_critic(x, config), out_shardings=placed(name), donate_argnums=0)
        return add(loaded)

    if model.score is None:
        bare = model.generator
        for name in (CRITIC, *_adapters(config)):
            bare = lora.remove(bare, name)
        generator = with_critic(_attach(base(config, bare), config), "generator")
        score = None
    else:
        generator = base(config, model.generator)
        score = with_critic(base(score_config(config), lora.remove(model.score)), "score")
    sizes = model.generator
    make = jax.jit(lambda: _discriminator(config, sizes), out_shardings=placed("discriminator"))
    return Players(generator, score, None if model.discriminator is None else make())
