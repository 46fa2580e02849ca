"""Stages 1 and 2: flow matching, chunk by chunk, with history that drops out and drifts (paper sections 3.1 to 3.4).

Stage 1 teaches a text-to-video model to go on from a history; stage 2 (`flow.pyramid`) teaches it to do so in levels of
growing size. A batch holds `target` [b, t, h, w, c], `history` [b, frames, h, w, c], `anchor` [b, 1, h, w, c]
(normalized latents), `text` [b, m, d] and `chunk` [b], as `helios_jax.precompute` and `chunk_transform` make them; and
`id`, which names bad clips in errors.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from helios_jax.config import ConfigError
from helios_jax.data.loader import chunk_transform
from helios_jax.data.records import EMPTY_TEXT, Source
from helios_jax.diffusion.corruption import corrupt_history, drop_history
from helios_jax.diffusion.memory import History
from helios_jax.diffusion.schedule import level_ranges
from helios_jax.diffusion.targets import FlowSample, draw_quantile, flow_loss, pyramid_samples, straight_sample
from helios_jax.models.transformer import Transformer, TransformerConfig
from helios_jax.training.flow_config import ClipFlowConfig, FlowConfig, FlowTrainConfig, TransformerTrainConfig
from helios_jax.training.lineage import check_init
from helios_jax.training.run_config import DataConfig
from helios_jax.training.stage import Batches, Metrics, host_batches
from helios_jax.training.stages.model_inputs import make_context, velocities
from helios_jax.training.stages.transformer_stage import TransformerStage
from helios_jax.training.start import transformer_config
from helios_jax.training.training_data import (
    Axis,
    Field,
    check_record,
    load_embedding,
    one_of_each,
    open_records,
)
from helios_jax.training.validation import check_validation

MAKE = "python -m helios_jax.precompute --help"


class FlowStage(TransformerStage[FlowTrainConfig]):
    """Flow matching of the transformer; with `flow.pyramid`, at all levels."""

    Config = FlowTrainConfig

    def batches(self, mesh: Mesh) -> Batches:
        """Random chunks and their history, this host's rows of each batch.

        Raises ConfigError for data or components that are not there or do not fit.
        """
        check_init(self.config)
        return chunks(self.config.data, self.config.flow, open_latents(self.config), mesh)

    def loss(
        self, model: Transformer, batch: dict[str, Any], keys: Key[Array, " b"]
    ) -> tuple[Float[Array, ""], Metrics]:
        """Mean squared error of the velocity, and its parts: of early and late times, or of the levels of the pyramid.

        A sample's draws depend on its own key alone.
        """
        config, flow = self.config, self.config.flow
        k_drop, k_corrupt, k_time, k_noise = (fold(keys, i) for i in range(4))
        history, anchor = batch["history"], batch["anchor"]
        if flow.drop is not None:
            history, anchor = drop_history(k_drop, history, anchor, flow.drop, flow.memory)
        if flow.corruption is not None:
            history, anchor = corrupt_history(k_corrupt, history, anchor, flow.corruption, flow.memory)
        past = History(history, anchor, jnp.asarray(True), batch["chunk"])

        noise = jax.vmap(lambda k: jax.random.normal(k, batch["target"].shape[1:]))(k_noise)
        samples = make_samples(batch["target"], noise, k_time, flow)
        noisy, timesteps = [sample.noisy for sample in samples], [sample.timestep for sample in samples]
        context = make_context(model, past, batch["text"], config)
        packed = flow.pyramid is None or flow.pyramid.levels == "packed"
        predicted = velocities(model, noisy, timesteps, context, config, packed=packed)
        errors = jnp.stack([flow_loss(v, sample, flow.times) for v, sample in zip(predicted, samples, strict=True)])
        return errors.mean(), _metrics(errors, samples, flow)


def open_latents(config: TransformerTrainConfig, num_chunks: int = 1) -> Source:
    """Opens the records of clips; each must have the `num_chunks` chunks of a sample.

    Raises ConfigError for components or records that are not there or do not fit.
    """
    memory, model = config.flow.memory, transformer_config(config)
    latents = (
        Axis("chunks", num_chunks, "distill.rollout.largest", or_more=True),
        Axis("frames a chunk", memory.frames_per_chunk, "flow.memory.frames_per_chunk"),
        Axis("rows"),
        Axis("columns"),
        Axis("channels", model.in_channels, "in_channels of the transformer"),
    )
    check_validation(config)
    source = open_records(config.data, MAKE)
    for example in one_of_each(source):
        check_record(example, {"latents": Field(latents), "text": text_field(model)}, config.data, MAKE)
        check_size(example["latents"].shape[-3:-1], config)
    return source


def text_field(model: TransformerConfig) -> Field:
    """The field of a text embedding, of the width that the transformer takes."""
    return Field((Axis("tokens"), Axis("features", model.text_dim, "text_dim of the transformer")))


def chunks(
    data: DataConfig,
    flow: ClipFlowConfig,
    source: Source,
    mesh: Mesh,
    num_chunks: int = 1,
    constant: str | None = None,
) -> Batches:
    """Batches of `num_chunks` chunks in a row of `source`, their latents one after the other in `target`.

    `constant` names a file beside the records with an embedding that every sample gets as `negative`.
    Raises ConfigError for an embedding that is not there or does not fit.
    """
    memory = flow.memory
    first = one_of_each(source)[0]
    empty = load_embedding(data, EMPTY_TEXT, first, MAKE)
    more: dict[str, np.ndarray] = {}
    if constant is not None:
        more = {"negative": load_embedding(data, constant, first, MAKE).astype(np.float32)}
    pick = chunk_transform(memory.frames, memory.frames_per_chunk, num_chunks, first=flow.first_chunk)

    def transform(example, rng):
        example = pick(example, rng)
        text = empty if rng.random() < flow.text_drop else example["text"]
        arrays = {name: example[name].astype(np.float32) for name in ("target", "history", "anchor")}
        known = {"id": f"{example['id']} chunk {example['chunk']}"} if "id" in example else {}
        return {**arrays, "text": text.astype(np.float32), "chunk": example["chunk"], **known, **more}

    return host_batches(source, transform, data, mesh)


def check_size(size: tuple[int, ...], config: TransformerTrainConfig) -> None:
    """Raises ConfigError unless latents of height and width `size` divide into patches at every level."""
    levels = 1 if config.pyramid is None else config.pyramid.num_levels
    patch = transformer_config(config).patch_size
    for name, latents, p in zip(("high", "wide"), size, patch[1:]):
        if latents % (multiple := p * 2 ** (levels - 1)):
            raise ConfigError(
                f"data.folder: {config.data.folder} has latents {latents} {name}, not a multiple of {multiple}, which "
                f"{levels} levels in patches of {p} need; make it of other videos, or take fewer levels"
            )


def fold(keys: Key[Array, " b"], number: int) -> Key[Array, " b"]:
    """For each sample the key of its `number`-th draw."""
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def make_samples(
    target: Float[Array, "b t h w c"],
    noise: Float[Array, "b t h w c"],
    keys: Key[Array, " b"],
    flow: FlowConfig,
) -> list[FlowSample]:
    """Training samples of each clip: one or, with a pyramid, `sample_ratios[i]` of each level i."""
    if flow.pyramid is None:
        return [straight_sample(target, noise, draw_quantile(keys, flow.times), flow.times)]
    quantiles, used = [], 0
    for ratio in flow.pyramid.sample_ratios:
        numbers = range(used, used := used + ratio)
        quantiles.append([draw_quantile(fold(keys, i), flow.times) for i in numbers])
    return pyramid_samples(target, noise, quantiles, level_ranges(flow.pyramid.scheduler()), flow.times)


def _metrics(errors: Float[Array, "samples b"], samples: list[FlowSample], flow: FlowConfig) -> Metrics:
    """Sums of errors and numbers of samples, so that a mean over many steps counts every sample alike."""
    if flow.pyramid is None:
        noisy = samples[0].sigma > 0.5
        parts = {"loss_noisy": noisy, "loss_clean": ~noisy}
        return {name: ((errors[0] * part).sum(), part.sum()) for name, part in parts.items()}
    out, used = {}, 0
    for level, ratio in enumerate(flow.pyramid.sample_ratios):
        if ratio == 0:
            continue
        part = errors[used : used + ratio]
        out[f"loss_level_{level}"] = (part.sum(), jnp.asarray(part.size))
        used += ratio
    return out
