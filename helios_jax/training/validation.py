"""Validation: videos of a transformer in training, made by a pipeline with the other parts around it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from helios_jax.config import ConfigError
from helios_jax.locations import replacing
from helios_jax.media.mp4 import VideoWriter
from helios_jax.models.transformer import Transformer
from helios_jax.sampling import sampler
from helios_jax.sampling.checkpoint import Checkpoint
from helios_jax.sampling.frames import decode_video
from helios_jax.sampling.options import SamplingOptions
from helios_jax.sampling.pipeline import HeliosPipeline
from helios_jax.sampling.plan import make_plan
from helios_jax.sampling.stream import Call
from helios_jax.sampling.text import encode_prompts
from helios_jax.sharding import gather
from helios_jax.training.flow_config import TransformerTrainConfig
from helios_jax.training.pipeline_parts import open_components
from helios_jax.training.run_config import ValidationConfig
from helios_jax.training.trainable import settle_dtypes


def check_validation(config: TransformerTrainConfig) -> None:
    """Raises ConfigError, in one line, for components that do not fit or cannot make the validation videos.

    Warns of levels that the run does not train.
    """
    validation = config.validation
    if validation is not None and config.flow.components is None:
        raise ConfigError("validation: needs flow.components, the folder with the VAE and the text encoder")
    checkpoint = open_components(config)
    if validation is None or checkpoint is None:
        return
    try:
        parts = checkpoint.transformer, checkpoint.vae, checkpoint.scheduler, checkpoint.variant
        make_plan(*parts, sampling_options(validation))
    except ValueError as error:
        raise ConfigError(f"validation: {error}") from None
    checkpoint.variant.trained.warn_of_left_out("validation")


def sampling_options(validation: ValidationConfig) -> SamplingOptions:
    """The sampling options of validation videos; options that are None follow the model's training."""
    levels = validation.pyramid_num_inference_steps_list
    return SamplingOptions(
        height=validation.height,
        width=validation.width,
        num_frames=validation.num_frames,
        num_inference_steps=validation.num_inference_steps,
        pyramid_num_inference_steps_list=None if levels is None else list(levels),
        guidance_scale=validation.guidance_scale,
        fps=validation.fps,
    )


@dataclass
class _Pipeline(HeliosPipeline):
    """A pipeline whose text encoder is abstract: `embeddings` has the texts, by batches of prompts."""

    embeddings: Mapping[tuple[str, ...], np.ndarray] = field(default_factory=dict)

    def encode_prompt(self, prompts: Any, max_sequence_length: int | None = None) -> Float[Array, "b m d"]:
        """The embeddings of a batch that is known."""
        return jnp.asarray(self.embeddings[tuple(prompts)])


class _Stopped(Exception):
    """The run ends while a video is made."""


class Videos:
    """The videos of the validation prompts. The texts never change: their embeddings stay in the host's memory."""

    def __init__(self, config: TransformerTrainConfig):
        self._config = config
        self._embeddings: dict[tuple[str, ...], np.ndarray] = {}

    def make(self, model: Transformer, folder: Path, stop: Callable[[], bool]) -> dict[str, np.ndarray]:
        """Writes a video of each validation prompt, 0.mp4 and on, into `folder`.

        Returns the frames, uint8 [t, h, w, 3], of each. The VAE, and the first time the text encoder, are loaded here
        and dropped at the end, so that training steps have their memory. All hosts must call; the first writes.
        `stop()` is asked after every step of a chunk and before a video is decoded: if it is true, those that are
        written stay, and the others are left out.
        """
        config, checkpoint = self._config, open_components(self._config)
        validation = config.validation
        assert validation is not None
        assert checkpoint is not None
        dtype = jnp.dtype(config.precision)
        prompts, options = list(validation.prompts), sampling_options(validation)
        pipe = _Pipeline(
            jax.jit(lambda model: settle_dtypes(model, (), dtype))(model),
            checkpoint.load_vae(jnp.float32),
            checkpoint.abstract_text_encoder(),
            checkpoint.tokenizer,
            checkpoint.scheduler,
            checkpoint.variant,
            embeddings=self._texts(checkpoint, dtype, options.max_sequence_length),
        )
        plan = pipe.plan(options)
        call = pipe.prepare(prompts, validation.negative_prompt, plan, seed=validation.seed)

        def ask(*_: int) -> None:
            if stop():
                raise _Stopped

        made: dict[str, np.ndarray] = {}
        try:
            latents = _generate(pipe, call, ask)
            for i in range(len(prompts)):
                ask()
                video = decode_video(pipe.vae, latents[i : i + 1], plan, dtype="uint8")[0]
                if jax.process_index() == 0:
                    _write(folder / f"{i}.mp4", video, validation)
                made[str(i)] = video
        except _Stopped:
            pass
        return made

    def _texts(self, checkpoint: Checkpoint, dtype: Any, length: int | None) -> dict[tuple[str, ...], np.ndarray]:
        """The embeddings of the prompts and of as many negative prompts."""
        validation = self._config.validation
        assert validation is not None
        batches = [tuple(validation.prompts), (validation.negative_prompt,) * len(validation.prompts)]
        if unknown := [prompts for prompts in batches if prompts not in self._embeddings]:
            encoder = checkpoint.load_text_encoder(dtype)
            for prompts in unknown:
                self._embeddings[prompts] = np.asarray(encode_prompts(encoder, checkpoint.tokenizer, prompts, length))
        return self._embeddings


def _generate(pipe: HeliosPipeline, call: Call, progress: sampler.Progress) -> Float[Array, "b t h w c"]:
    """The latents of all chunks, on every host; step by step, with a call of `progress` after each."""
    assert call.plan.num_chunks is not None
    inputs = (
        (call.chunk_noise(), call.levels(chunk), call.conditioning(call.texts.kv(call.prompts.mixture(chunk))))
        for chunk in range(call.plan.num_chunks)
    )
    chunks = sampler.stream(
        pipe.transformer, call.history, inputs, memory=call.plan.memory, finish=lambda x: x, progress=progress
    )
    # A list first: when a chunk is yielded depends on the host, and to gather is a program of all hosts.
    return jnp.concatenate([jnp.asarray(gather(latents)) for latents, _ in list(chunks)], 1)


def _write(path: Path, video: np.ndarray, validation: ValidationConfig) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        replacing(path) as part,
        VideoWriter(part, validation.fps, validation.height, validation.width) as writer,
    ):
        writer.write(video)
