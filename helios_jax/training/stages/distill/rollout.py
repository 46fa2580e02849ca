"""Chunks that stage 3 scores: the history before them, the student's rollout, and real chunks in their place."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Key

from helios_jax.diffusion import exits
from helios_jax.diffusion.corruption import CorruptionConfig, corrupt_history, drop_history
from helios_jax.diffusion.denoise import ChunkNoise, Conditioning, denoise_to_exits
from helios_jax.diffusion.levels import make_levels
from helios_jax.diffusion.memory import History, push
from helios_jax.diffusion.pyramid import level_shapes
from helios_jax.models.transformer import Transformer
from helios_jax.training.pipeline_parts import student_scheduler
from helios_jax.training.stages.distill.distill_config import DistillTrainConfig
from helios_jax.training.stages.flow import fold


@struct.dataclass
class DistillInputs:
    """Inputs of the student that makes a chunk, and of the scores that judge it.

    `history` is the past before the first chunk, dropped but not corrupted; `keys` [b] are those of its corruption.
    Text and negative text are embeddings [b, m, d]; `real` [b, t, h, w, c] are the data's own chunks.
    """

    history: History
    keys: Any
    text: Any
    negative: Any
    real: Any


def make_inputs(batch: dict[str, Any], keys: Key[Array, " b"], config: DistillTrainConfig) -> DistillInputs:
    """The inputs of a batch, its history dropped."""
    past, settings = (batch["history"], batch["anchor"]), config.flow
    if settings.drop is not None:
        past = drop_history(fold(keys, 0), *past, settings.drop, settings.memory)
    history, anchor = past
    # Where there is no anchor yet, the first chunk of a rollout brings it.
    anchored = anchor.any((1, 2, 3, 4), keepdims=True)
    # All parts are per sample: losses repeat samples and interleave them.
    history = History(history, anchor, anchored, batch["chunk"], jnp.zeros_like(batch["chunk"]))
    return DistillInputs(history, fold(keys, 1), batch["text"], batch["negative"], batch["target"])


def corrupted(
    history: History, inputs: DistillInputs, chunk: Any, config: DistillTrainConfig
) -> tuple[History, History]:
    """The past before the `chunk`-th chunk of a rollout, as the student sees it and as the scores see it.

    Every chunk has draws of its own, the same ones for both; the scores see no change of the saturation.
    """

    def seen(corruption: CorruptionConfig | None) -> History:
        if corruption is None or corruption.is_nothing:
            return history
        memory = config.flow.memory
        latents, anchor = corrupt_history(fold(inputs.keys, chunk), history.latents, history.anchor, corruption, memory)
        return dataclasses.replace(history, latents=latents, anchor=anchor)

    corruption = config.flow.corruption
    student = seen(corruption)
    if corruption is None or corruption.saturation is None:
        return student, student
    return student, seen(dataclasses.replace(corruption, saturation=None))


def make_chunk(
    generator: Transformer,
    inputs: DistillInputs,
    chunks: Array,
    keys: Key[Array, " b"],
    common: Key[Array, ""],
    config: DistillTrainConfig,
    *,
    with_gradient: bool,
) -> tuple[Float[Array, "b t h w c"], History]:
    """Rolls out `chunks` chunks of the student; returns the last one, and the history that its scores see.

    As in upstream's rollouts, the past is corrupted before every chunk, the student's own chunks included. Draws come
    from `keys`, one for each sample, and from `common`, which all samples share. Only the last chunk has a gradient, if
    `with_gradient`.
    """
    distill, memory, dtype = config.distill, config.flow.memory, jnp.dtype(config.precision)
    shape = (memory.frames_per_chunk, *inputs.real.shape[2:])
    tokens = math.prod(n // p for n, p in zip(shape, generator.config.patch_size))
    levels, first_levels = (
        make_levels(
            student_scheduler(config),
            [times * n for n in distill.steps],
            tokens,
            pyramid=True,
            as_trained=True,
        )
        for times in (1, 1 + distill.amplify_first_chunk)
    )
    conditioning = Conditioning(generator.text_kv(inputs.text.astype(dtype)))

    def chunk(number: Any, history: History, with_gradient: bool) -> Array:
        own, shared = fold(keys, number), jax.random.fold_in(common, number)

        def normal(i: int, shape: tuple[int, ...]) -> Array:
            return jax.vmap(lambda key: jax.random.normal(key, shape))(fold(own, i))

        blocks = [normal(i, block) for i, block in enumerate(level_shapes(shape, len(levels))[1:], 1)]
        noise = ChunkNoise(normal(0, shape), tuple(blocks))
        first = exits.is_first_chunk(history)
        stops = exits.draw_exits(shared, levels, first_levels, first)
        return denoise_to_exits(
            generator,
            history,
            noise,
            conditioning,
            exits.end_at(stops, levels, first_levels, first),
            memory,
            stops,
            with_gradient=with_gradient,
            dtype=dtype,
            remat=config.remat,
        )

    past, last = inputs.history, chunks - 1
    if distill.rollout.largest > 1:

        def before(number: Array, past: History) -> History:
            student, _ = corrupted(past, inputs, number, config)
            return _pushed(past, chunk(number, student, False), config)

        past = jax.lax.fori_loop(0, last, before, past)
    student, scores = corrupted(past, inputs, last, config)
    return chunk(last, student, with_gradient), scores


def _pushed(history: History, latents: Array, config: DistillTrainConfig) -> History:
    """The history after a chunk, which has an anchor even if it had none before."""
    after = push(history, latents, config.flow.memory)
    return dataclasses.replace(after, anchored=jnp.ones_like(history.anchored))


def real_chunk(inputs: DistillInputs, chunks: Array, config: DistillTrainConfig) -> tuple[Array, History]:
    """The data's own chunk at the place of the student's last one, and its history."""
    t = config.flow.memory.frames_per_chunk

    def at(number: Any) -> Array:
        return jax.lax.dynamic_slice_in_dim(inputs.real, number * t, t, 1)

    past, last = inputs.history, chunks - 1
    if config.distill.rollout.largest > 1:
        past = jax.lax.fori_loop(0, last, lambda i, past: _pushed(past, at(i), config), past)
    return at(last), corrupted(past, inputs, last, config)[1]
