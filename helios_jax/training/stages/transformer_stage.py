"""The stages whose model is the transformer alone: its weights, its videos on the way, its export."""

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Array, Key

from helios_jax.models.transformer import Transformer
from helios_jax.training import start
from helios_jax.training.export import export_pipeline
from helios_jax.training.flow_config import TransformerTrainConfig
from helios_jax.training.stage import Stage
from helios_jax.training.validation import Videos
from helios_jax.training.work import tokens

TransformerConfigT = TypeVar("TransformerConfigT", bound=TransformerTrainConfig)


class TransformerStage(Stage[TransformerConfigT, Transformer]):
    """A stage that trains the transformer; a subclass gives batches and the loss."""

    Config = TransformerTrainConfig

    def init(self, key: Key[Array, ""]) -> Transformer:
        """Random parameters, with adapters where `config.lora` asks."""
        return start.init_transformer(self.config, key)

    def load(self, model: Transformer, shardings: Any = None) -> Transformer:
        """The weights that `config.init` names, with new adapters."""
        return start.load_transformer(self.config, model, shardings)

    def tokens(self, batch: dict[str, Any]) -> int:
        """Noisy and history tokens of the sequences of one sample."""
        return tokens(self.config, batch)

    def export(self, model: Transformer, folder: Path) -> None:
        """Writes `folder`/pipeline, and adapters alone into `folder`/lora."""
        export_pipeline(model, self.config, folder)

    @cached_property
    def videos(self) -> Videos:
        """The videos of validation."""
        return Videos(self.config)

    def validate(self, model: Transformer, folder: Path, stop: Callable[[], bool]) -> Mapping[str, np.ndarray]:
        """Writes a video of each validation prompt into `folder`; returns their frames."""
        return self.videos.make(model, folder, stop)
