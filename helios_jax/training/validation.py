"""Validation: videos of a transformer in training, made by a pipeline with the other parts around it."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from helios_jax.config import ConfigError
from helios_jax.locations import replacing
from helios_jax.media.mp4 import VideoWriter
from helios_jax.models.transformer import Transformer
from helios_jax.sampling.frames import decode_video
from helios_jax.sampling.options import SamplingOptions
from helios_jax.sampling.pipeline import HeliosPipeline
from helios_jax.sampling.plan import make_plan
from helios_jax.sharding import gather
from helios_jax.training.flow_config import TransformerTrainConfig
from helios_jax.training.pipeline_parts import open_components
from helios_jax.training.run_config import ValidationConfig
from helios_jax.training.trainable import settle_dtypes


def check_validation(config: TransformerTrainConfig) -> None:
    """Raises ConfigError, in one line, for components that do not fit or cannot make the validation videos."""
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


def make_videos(model: Transformer, config: TransformerTrainConfig, folder: Path) -> dict[str, np.ndarray]:
    """Writes a video of each validation prompt, 0.mp4 and on, into `folder`.

    Returns the frames, uint8 [t, h, w, 3], of each. The VAE and the text encoder are loaded here and dropped at the
    end, so that training steps have their memory. All hosts must call; the first writes.
    """
    validation, checkpoint = config.validation, open_components(config)
    assert validation is not None
    assert checkpoint is not None
    dtype = jnp.dtype(config.precision)
    pipe = HeliosPipeline(
        jax.jit(lambda model: settle_dtypes(model, (), dtype))(model),
        checkpoint.load_vae(jnp.float32),
        checkpoint.load_text_encoder(dtype),
        checkpoint.tokenizer,
        checkpoint.scheduler,
        checkpoint.variant,
    )
    prompts, plan = list(validation.prompts), pipe.plan(sampling_options(validation))
    call = pipe.prepare(prompts, validation.negative_prompt, plan, seed=validation.seed)
    latents = jnp.asarray(gather(pipe.generate(call)))
    frames = decode_video(pipe.vae, latents, plan, dtype="uint8")
    if jax.process_index() == 0:
        for i, video in enumerate(frames):
            folder.mkdir(parents=True, exist_ok=True)
            with (
                replacing(folder / f"{i}.mp4") as part,
                VideoWriter(part, validation.fps, validation.height, validation.width) as writer,
            ):
                writer.write(video)
    return {str(i): video for i, video in enumerate(frames)}
