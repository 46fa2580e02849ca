"""Networks of stage 3: generator, scores, discriminator, and where their weights come from."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from helios_jax import lora
from helios_jax.config import ConfigError
from helios_jax.models.discriminator import Discriminator
from helios_jax.models.transformer import Transformer
from helios_jax.sharding import shardings as placements
from helios_jax.training import start
from helios_jax.training.config import ModelConfig, TrainConfig

CRITIC = "critic"  # the name of the fake score's adapters


class CriticWeight(lora.LoRAWeight):
    """A matrix of the fake score's adapters, which may stand on the generator's weights."""


def of_student(path: tuple[Any, ...], variable: Any) -> bool:
    """The filter for the student's parameters; the others are those of the scores and of the discriminator."""
    return path[0] == "generator" and not isinstance(variable, CriticWeight)


class Players(nnx.Module):
    """The generator, the scores' transformer and the discriminator, None where there is none.

    Real and fake score are one set of weights: the fake has the adapters `critic` beside them. Without `score` they
    stand on the generator's weights, which then has adapters of its own: those that are trained, and those that made
    the student out of the teacher before.
    """

    FLOAT32 = Transformer.FLOAT32
    AVERAGED = staticmethod(of_student)

    def __init__(self, generator: Transformer, score: Transformer | None, discriminator: Discriminator | None):
        self.generator, self.score, self.discriminator = generator, score, discriminator

    @property
    def student(self) -> Transformer:
        """The model of few steps."""
        return self.generator if self.score is not None else lora.remove(self.generator, CRITIC)

    @property
    def fake(self) -> Transformer:
        """The critic: it knows what the student makes."""
        if self.score is not None:
            return self.score
        model = self.generator
        for name in lora.names(model):
            model = model if name == CRITIC else lora.remove(model, name)
        return model

    @property
    def real(self) -> Transformer:
        """The teacher."""
        return lora.remove(self.fake)


def score_config(config: TrainConfig) -> TrainConfig:
    """The config of a run that would train the critic alone, as `training.start` reads it."""
    assert config.distill is not None
    score = config.distill.score
    return dataclasses.replace(
        config, init=score.init, init_subfolder=score.init_subfolder, lora=None, trainable=("all",), model=ModelConfig()
    )


def _attach(model: Transformer, config: TrainConfig) -> Transformer:
    """`model` with the adapters, frozen, that make the student out of the teacher; named by their number."""
    for name, file in _adapters(config).items():
        model = lora.freeze(lora.attach(model, {name: file}, dtype=config.precision), name)
    return model


def _adapters(config: TrainConfig) -> dict[str, str]:
    assert config.distill is not None
    return {f"before_{i}": file for i, file in enumerate(config.distill.score.adapters)}


def _add_critic(model: Transformer, config: TrainConfig) -> Transformer:
    assert config.distill is not None
    asked = config.distill.critic.lora
    adapter = lora.LoRAConfig(asked.rank, asked.alpha, asked.target_modules, init="gaussian", name=CRITIC)
    try:
        model = lora.add(model, adapter, jax.random.fold_in(jax.random.key(config.seed), 2), dtype=jnp.float32)
    except ValueError as error:
        raise ConfigError(f"distill.critic.lora: {error}") from None
    return lora.adapters.set_kind(model, CRITIC, CriticWeight)


def _discriminator(config: TrainConfig, model: Transformer) -> Discriminator | None:
    assert config.distill is not None
    if config.distill.gan is None:
        return None
    sizes, key = model.config, jax.random.fold_in(jax.random.key(config.seed), 3)
    return Discriminator(
        config.distill.gan.discriminator, sizes.dim, sizes.out_channels or sizes.in_channels, rngs=nnx.Rngs(key)
    )


def init(config: TrainConfig, key: jax.Array) -> Players:
    """All players with random weights, new adapters as they begin in `load`."""
    assert config.distill is not None
    generator = start.init_transformer(config, key)
    if config.distill.score.init is None:
        return Players(_add_critic(_attach(generator, config), config), None, _discriminator(config, generator))
    score = start.init_transformer(score_config(config), jax.random.fold_in(key, 1))
    return Players(generator, _add_critic(score, config), _discriminator(config, score))


def load(config: TrainConfig, model: Players, shardings: Any = None) -> Players:
    """The abstract `model` of `init` with the generator from `config.init` and the scores from `distill.score.init`.

    Raises CheckpointError when the files do not fit.
    """

    def base(config: TrainConfig, model: Transformer) -> Transformer:
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
