"""Stage 3, first part: the student learns where the teacher's paths end (paper section 3.5).

A batch holds lists over the levels, coarsest first: `noisy` [b, t, h_i, w_i, c], where one of the student's steps
begins, `target` of the same shape, the teacher's result from there, `timestep` and `sigma` [b]; and `history`,
`anchor`, `chunk` and `text` of the chunk. `python -m helios_jax.precompute ode` makes them from a Mid checkpoint. The
loss is upstream's _ode_regression_loss; a sample is one chunk where upstream takes three of a video.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from helios_jax.config import ConfigError
from helios_jax.data.loader import ode_transform
from helios_jax.data.records import open_source
from helios_jax.diffusion.distillation import ode_loss
from helios_jax.diffusion.memory import History, window
from helios_jax.models.transformer import Transformer
from helios_jax.training.flow_config import StudentTrainConfig
from helios_jax.training.stage import Batches, Metrics, host_batches
from helios_jax.training.stages.transformer_stage import TransformerStage
from helios_jax.training.start import transformer_config
from helios_jax.training.validation import check_validation


@dataclass
class ODETrainConfig(StudentTrainConfig):
    """A run of stage 3, first part."""

    stage: str = "ode"


class ODEStage(TransformerStage[ODETrainConfig]):
    """Regression of the student on the ends of the teacher's paths."""

    Config = ODETrainConfig

    def batches(self) -> Batches:
        """A step of each level of random chunks of the teacher's videos, this host's part of each batch.

        Raises ConfigError for data or components that are not there or do not fit.
        """
        config = self.config
        check_validation(config)
        try:
            source = open_source(config.data.folder, "train", make="python -m helios_jax.precompute ode --help")
        except (FileNotFoundError, ValueError) as error:
            raise ConfigError(f"data.folder: {error}") from None
        _check(source[0], config)

        def transform(example, rng):
            example = ode_transform(example, rng)
            names = ("noisy", "target", "timestep", "sigma", "history", "anchor", "text")
            arrays = jax.tree.map(lambda x: np.asarray(x, np.float32), {name: example[name] for name in names})
            return {**arrays, "chunk": example["chunk"], "id": example["id"]}

        return host_batches(source, transform, config.data)

    def loss(
        self, model: Transformer, batch: dict[str, Any], keys: Key[Array, " b"]
    ) -> tuple[Float[Array, ""], Metrics]:
        """`ode_weight` times the mean over levels of half the squared error of the path's end; nothing is drawn."""
        config, distill = self.config, self.config.distill
        dtype = jnp.dtype(config.precision)
        history = History(batch["history"], batch["anchor"], jnp.asarray(True), batch["chunk"])
        parts, indices = window(config.flow.memory, history)
        parts = jax.tree.map(lambda x: x.astype(dtype), parts)
        text = model.text_kv(batch["text"].astype(dtype))

        def velocities(levels: list[int]) -> tuple[Array, ...]:
            noisy = tuple(batch["noisy"][i].astype(dtype) for i in levels)
            timesteps = jnp.stack([batch["timestep"][i] for i in levels], 1)
            return model.packed(noisy, timesteps, text, parts, indices, remat=config.remat)

        numbers = list(range(len(distill.steps)))
        groups = [[i] for i in numbers] if config.pyramid.levels == "separate" else [numbers]
        predicted = [velocity for group in groups for velocity in velocities(group)]
        errors = [
            ode_loss(*args) for args in zip(batch["noisy"], predicted, batch["target"], batch["sigma"], strict=True)
        ]
        metrics = {f"loss_level_{i}": (error.sum(), jnp.asarray(error.size)) for i, error in enumerate(errors)}
        return distill.ode_weight * jnp.stack(errors).mean(), metrics


def _check(example: dict[str, Any], config: ODETrainConfig) -> None:
    """Raises ConfigError for pairs of other levels, chunks or channels than the run asks for."""
    levels = sum(key.startswith("latents_") for key in example)
    memory, folder = config.flow.memory, config.data.folder
    if levels != len(config.distill.steps):
        made = "holds no ODE pairs" if not levels else f"has pairs of {levels} levels"
        raise ConfigError(
            f"data.folder: {folder} {made}, distill.steps {list(config.distill.steps)} asks for "
            f"{len(config.distill.steps)}; make it with python -m helios_jax.precompute ode"
        )
    frames, history, channels = (*example[f"latents_{levels - 1}"].shape[1:2], *example["history"].shape[::3])
    if (frames, history) != (memory.frames_per_chunk, memory.frames):
        raise ConfigError(
            f"data.folder: {folder} has {frames} latent frames a chunk after a history of {history}, flow.memory asks "
            f"for {memory.frames_per_chunk} after {memory.frames}"
        )
    if channels != (asked := transformer_config(config).in_channels):
        raise ConfigError(f"data.folder: {folder} has latents of {channels} channels, the transformer takes {asked}")
