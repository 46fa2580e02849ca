"""Stage 3, first part: the student learns where the teacher's paths end (paper section 3.5).

A batch holds lists over the levels, coarsest first: `noisy` and `target` [b, t, h_i, w_i, c], `timestep` and `sigma`
[b], which are what one of the student's steps begins with and what the teacher made of it; and `history`, `anchor`,
`chunk` and `text` of the chunk. `python -m helios_jax.precompute ode` makes them from a Mid checkpoint. The loss
is upstream's _ode_regression_loss; a sample is one chunk where upstream takes three of a video.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from helios_jax.config import ConfigError
from helios_jax.data.loader import loader, ode_transform
from helios_jax.data.records import open_source
from helios_jax.diffusion.distillation import ode_loss
from helios_jax.diffusion.memory import History, window
from helios_jax.models.transformer import Transformer
from helios_jax.training.config import TrainConfig
from helios_jax.training.pipeline import export, open_components, validate
from helios_jax.training.stages.flow import Metrics
from helios_jax.training.start import init_transformer as init
from helios_jax.training.start import load_transformer as load
from helios_jax.training.start import transformer_config

__all__ = ["batches", "export", "init", "load", "loss", "validate"]


def batches(config: TrainConfig) -> Any:
    """A step of each level of random chunks of the teacher's videos, this host's part of each batch.

    Raises ConfigError for data or components that are not there or do not fit.
    """
    open_components(config)
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

    return loader(
        source,
        seed=config.data.seed,
        batch_size=config.data.batch_size,
        transform=transform,
        num_hosts=jax.process_count(),
        host=jax.process_index(),
        workers=config.data.workers,
    )


def _check(example: dict[str, Any], config: TrainConfig) -> None:
    assert config.distill is not None
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


def loss(
    model: Transformer, batch: dict[str, Any], keys: Key[Array, " b"], config: TrainConfig
) -> tuple[Float[Array, ""], Metrics]:
    """`ode_weight` times the mean over levels of half the squared error of the path's end; nothing is drawn."""
    distill, pyramid, dtype = config.distill, config.flow.pyramid, jnp.dtype(config.precision)
    assert distill is not None
    assert pyramid is not None
    history = History(batch["history"], batch["anchor"], jnp.asarray(True), batch["chunk"])
    parts, indices = window(config.flow.memory, history)
    parts = jax.tree.map(lambda x: x.astype(dtype), parts)
    text = model.text_kv(batch["text"].astype(dtype))

    def velocities(levels: list[int]) -> tuple[Array, ...]:
        noisy = tuple(batch["noisy"][i].astype(dtype) for i in levels)
        timesteps = jnp.stack([batch["timestep"][i] for i in levels], 1)
        return model.packed(noisy, timesteps, text, parts, indices, remat=config.remat)

    numbers = list(range(len(distill.steps)))
    groups = [[i] for i in numbers] if pyramid.levels == "separate" else [numbers]
    predicted = [velocity for group in groups for velocity in velocities(group)]
    errors = [ode_loss(*args) for args in zip(batch["noisy"], predicted, batch["target"], batch["sigma"], strict=True)]
    metrics = {f"loss_level_{i}": (error.sum(), jnp.asarray(error.size)) for i, error in enumerate(errors)}
    return distill.ode_weight * jnp.stack(errors).mean(), metrics
