"""The Stage protocol: the methods that training asks of a stage, and the config that the stage reads.

A stage trains one model on one kind of batch towards one loss. The loop, the optimiser, checkpoints and the command
line are the same for all of them (`training.loop`, `training.cli`).
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from helios_jax.config import ConfigError
from helios_jax.data.loader import Batches, Transform, loader
from helios_jax.data.records import Source
from helios_jax.runtime import hosts
from helios_jax.sharding import batch_rows
from helios_jax.training import optim
from helios_jax.training.run_config import DataConfig, TrainConfig

# Each value is a number, or (sum, divisor): both are added up over the steps of a report before the division.
Metrics = Mapping[str, Any]

ConfigT = TypeVar("ConfigT", bound=TrainConfig)
ModelT = TypeVar("ModelT", bound=nnx.Module)


def host_batches(source: Source, transform: Transform, data: DataConfig, mesh: Mesh) -> Batches:
    """This host's rows of shuffled batches of `source`, each sample cut by `transform`.

    Raises ConfigError where the hosts have different records.
    """
    buckets = {name: len(numbers) for name, numbers in getattr(source, "buckets", {}).items()}
    here = json.dumps([len(source), buckets])
    if (first := hosts.of_first("records", here)) != here:
        raise ConfigError(
            f"data.folder: {data.folder} has {len(source)} records here, {json.loads(first)[0]} on host 0, or other "
            "sizes of them; give all hosts the same data"
        )
    return loader(
        source,
        seed=data.seed,
        batch_size=data.batch_size,
        transform=transform,
        rows=batch_rows(data.batch_size, mesh),
        workers=data.workers,
    )


@dataclass(frozen=True)
class Player:
    """A loss, `(model, batch, keys) -> (mean over samples, metrics)`, and the parameters that it alone trains.

    `trains` is an nnx filter of these. The player has a turn every `every` steps, the first one included.
    """

    loss: Callable[..., tuple[Float[Array, ""], Metrics]]
    trains: Any = ...
    every: int = 1

    def take(self, step: Any, function: Callable[..., Any], *operands: Any) -> Any:
        """`function` of the operands on the player's turns; zeros, and no computation, on the other steps."""
        if self.every == 1:
            return function(*operands)
        shapes = jax.eval_shape(function, *operands)

        def nothing(*_: Any) -> Any:
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        return jax.lax.cond(step % self.every == 0, function, nothing, *operands)


class Stage(ABC, Generic[ConfigT, ModelT]):
    """One stage of training, made from its config.

    A subclass names its schema in `Config`, with no key that it does not read, and gives `init`, `batches`, and `loss`
    or `players`; the other methods have defaults. All raise ConfigError, in one line, for settings that cannot work.
    """

    Config: ClassVar[type[TrainConfig]] = TrainConfig

    def __init__(self, config: ConfigT):
        self.config = config

    @abstractmethod
    def init(self, key: Key[Array, ""]) -> ModelT:
        """The model with random parameters; traced, so that it can be made in shards."""

    def load(self, model: ModelT, shardings: Any = None) -> ModelT:
        """The abstract `model` of `init` filled from `config.init`, in its dtypes."""
        raise ConfigError(f"init: the stage {self.config.stage} begins with random weights only; set init to null")

    @abstractmethod
    def batches(self, mesh: Mesh) -> Batches:
        """This host's rows of each batch (`sharding.batch_rows`): a mapping of names to arrays, samples first.

        Its `id`, if there is one, names the samples.
        """

    def loss(self, model: ModelT, batch: dict[str, Any], keys: Key[Array, " b"]) -> tuple[Float[Array, ""], Metrics]:
        """(mean over samples, metrics); each sample draws from its own key, `batch["step"]` is the step's number."""
        raise NotImplementedError(f"{type(self).__name__} has neither a loss nor players")

    def tokens(self, batch: dict[str, Any]) -> int | None:
        """Tokens of one sample of `batch` that the model is trained on; None for a model that has none."""
        return None

    def players(self) -> Sequence[Player]:
        """The losses of a step, computed one after the other: a player's activations are freed before the next begins.

        No two players train the same parameter, and all see the parameters from before the step. By default, one
        player trains all parameters by `loss`.
        """
        return (Player(self.loss),)

    def make_optimizer(self) -> optax.GradientTransformation:
        """The optimizer that `config.optim` names."""
        return optim.make_optimizer(self.config.optim, self.config.steps)

    def learning_rates(self, step: int) -> Mapping[str, float]:
        """The learning rates of step `step`, from 0, by the name under which they are shown."""
        return {"lr": optim.rate_at(self.config.optim, self.config.steps, step)}

    def export(self, model: ModelT, folder: Path) -> None:
        """Writes the run's result into `folder`, in diffusers layout; by default nothing beside the checkpoints."""

    def validate(self, model: ModelT, folder: Path, stop: Callable[[], bool]) -> Mapping[str, np.ndarray]:
        """Writes samples of the model into `folder`; returns them, uint8 [h, w, 3] or [t, h, w, 3]. By default none.

        `stop()` is true when the run has been told to end. Ask it every few seconds, at the same points on all hosts,
        and return early.
        """
        return {}
