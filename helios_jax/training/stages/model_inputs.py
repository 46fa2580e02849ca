"""Inputs of the transformer in training, in the run's precision: history, positions and text, and packed latents."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from helios_jax.diffusion.memory import History, window
from helios_jax.models.transformer import FrameIndices, HistoryLatents, TextCache, Transformer
from helios_jax.training.flow_config import TransformerTrainConfig


class Context(NamedTuple):
    """The transformer's arguments after latents and times: keys and values of the text, history, frame indices."""

    text: TextCache
    history: HistoryLatents
    indices: FrameIndices


def make_context(model: Transformer, history: History, text: Array, config: TransformerTrainConfig) -> Context:
    """The context of `history`, through the window of `config.flow.memory`, and of `text` embeddings [b, m, d]."""
    dtype = jnp.dtype(config.precision)
    parts, indices = window(config.flow.memory, history)
    return Context(model.text_kv(text.astype(dtype)), jax.tree.map(lambda x: x.astype(dtype), parts), indices)


def velocities(
    model: Transformer,
    noisy: Sequence[Float[Array, "b t _h _w c"]],
    timesteps: Sequence[Float[Array, " b"]],
    context: Context,
    config: TransformerTrainConfig,
    *,
    packed: bool,
) -> list[Float[Array, "b t _h _w c"]]:
    """The velocity of each of `noisy`, latents of the same chunks: in one sequence if `packed`, else one by one."""
    every = list(range(len(noisy)))
    predicted = []
    for group in [every] if packed else [[i] for i in every]:
        latents = tuple(noisy[i].astype(config.precision) for i in group)
        times = jnp.stack([timesteps[i] for i in group], 1)
        predicted += model.packed(latents, times, *context, remat=config.remat)
    return predicted
