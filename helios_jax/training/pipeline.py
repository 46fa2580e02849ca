"""The pipeline around a transformer in training: asked for videos on the way, exported at the end."""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from helios_jax import lora, pretrained
from helios_jax.config import ConfigError
from helios_jax.diffusion.schedule import DMDSchedulerConfig, SchedulerConfig
from helios_jax.media.video import VideoWriter
from helios_jax.models.tokenizer import Tokenizer
from helios_jax.models.transformer import Transformer
from helios_jax.models.umt5 import UMT5Config
from helios_jax.models.vae import VAEConfig
from helios_jax.pretrained import CheckpointError
from helios_jax.sampling.checkpoint import PARTS, TRAINED_SIZE, Checkpoint, write_index
from helios_jax.sampling.frames import decode_video
from helios_jax.sampling.options import Options
from helios_jax.sampling.pipeline import HeliosPipeline
from helios_jax.sampling.plan import Variant, make_plan
from helios_jax.sharding import gather
from helios_jax.training.config import TrainConfig, ValidationConfig
from helios_jax.training.start import transformer_config
from helios_jax.training.trainable import settle_dtypes

COPIED = ("vae", "text_encoder", "tokenizer")
STRIP = 8  # frames of a validation video that are shown side by side


def open_components(config: TrainConfig) -> Checkpoint | None:
    """Opens the components beside the transformer (`flow.components`), with the scheduler that the trained one needs.

    None when the config names no components. Raises ConfigError, in one line, for components that are not there, that
    do not fit the transformer or that cannot make the validation videos.
    """
    flow = config.flow
    if flow.components is None:
        if config.validation is not None:
            raise ConfigError("validation: needs flow.components, the folder with the VAE and the text encoder")
        return None
    try:
        folder = pretrained.resolve(flow.components, PARTS)
        if missing := [part for part in (*PARTS, "model_index.json") if not (folder / part).exists()]:
            raise CheckpointError(f"{flow.components} has no {', '.join(missing)}")
        index = pretrained.read_json(folder / "model_index.json")
        variant = Variant(trained_size=tuple(index.get(TRAINED_SIZE, Variant.trained_size)))
        if config.distill is not None:  # a student knows the times that it was trained at, and no others
            scheduler = student_scheduler(config)
            variant = dataclasses.replace(variant, pyramid=True, is_distilled=True)
        else:
            scheduler = SchedulerConfig(stages=1, stage_range=(0.0, 1.0), use_dynamic_shifting=True)
            if flow.pyramid is not None:
                scheduler = flow.pyramid.scheduler()
                variant = dataclasses.replace(variant, pyramid=True, is_cfg_zero_star=True)
            if not index.get("is_distilled", False):  # else the folder's scheduler is one of few steps
                found = pretrained.read_config(folder / "scheduler", SchedulerConfig, "scheduler_config.json")
                scheduler = found if found.stages == scheduler.stages else scheduler
        checkpoint = Checkpoint(
            folder=folder,
            subfolder="transformer",
            variant=variant,
            transformer=transformer_config(config),
            vae=pretrained.read_config(folder / "vae", VAEConfig),
            text_encoder=pretrained.read_config(folder / "text_encoder", UMT5Config),
            scheduler=scheduler,
            tokenizer=Tokenizer.from_pretrained(folder / "tokenizer"),
        )
    except CheckpointError as error:
        raise ConfigError(f"flow.components: {error}") from None
    for ours, theirs, name in (
        (checkpoint.transformer.in_channels, checkpoint.vae.z_dim, "channels of the VAE's latents"),
        (checkpoint.transformer.text_dim, checkpoint.text_encoder.d_model, "width of the text encoder"),
    ):
        if ours != theirs:
            raise ConfigError(f"flow.components: {theirs} is the {name}, but the transformer takes {ours}")
    if config.validation is not None:
        try:
            parts = checkpoint.transformer, checkpoint.vae, checkpoint.scheduler, checkpoint.variant
            make_plan(*parts, _options(config.validation, config))
        except ValueError as error:
            raise ConfigError(f"validation: {error}") from None
    return checkpoint


def student_scheduler(config: TrainConfig) -> DMDSchedulerConfig:
    """The scheduler of the student's levels and steps, in training and in the exported pipeline."""
    pyramid, distill = config.flow.pyramid, config.distill
    assert pyramid is not None
    assert distill is not None
    return DMDSchedulerConfig(
        stages=len(distill.steps),
        stage_range=pyramid.stage_range,
        gamma=pyramid.gamma,
        use_dynamic_shifting=distill.shift is not None,
        time_shift_type=distill.shift or "linear",
    )


def _options(validation: ValidationConfig, config: TrainConfig) -> Options:
    memory, pyramid, distill = config.flow.memory, validation.pyramid_num_inference_steps_list, config.distill
    if distill is not None:
        pyramid = pyramid or distill.steps
    return Options(
        height=validation.height,
        width=validation.width,
        num_frames=validation.num_frames,
        num_inference_steps=validation.num_inference_steps,
        pyramid_num_inference_steps_list=None if pyramid is None else list(pyramid),
        guidance_scale=validation.guidance_scale,
        history_sizes=(memory.long, memory.mid, memory.recent),
        num_latent_frames_per_chunk=memory.frames_per_chunk,
        fps=validation.fps,
        is_amplify_first_chunk=distill is not None and distill.amplify_first_chunk,
    )


def validate(model: Transformer, config: TrainConfig, folder: Path) -> dict[str, np.ndarray]:
    """Writes a video of each validation prompt, 0.mp4 and on, into `folder`.

    Returns a strip of frames, uint8 [h, w, 3], of each. The VAE and the text encoder are loaded for it and let go
    again: while steps are taken the memory is theirs. All hosts must call; the first writes.
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
    plan, prompts = pipe.plan(_options(validation, config)), list(validation.prompts)
    call = pipe.prepare(prompts, validation.negative_prompt, plan, seed=validation.seed)
    latents = np.asarray(gather(pipe.generate(call)))
    frames = decode_video(pipe.vae, jnp.asarray(latents), plan.memory.frames_per_chunk, dtype="uint8")
    frames = frames[:, : validation.num_frames]
    if jax.process_index() == 0:
        for i, video in enumerate(frames):
            with VideoWriter(folder / f"{i}.mp4", validation.fps, validation.height, validation.width) as writer:
                writer.write(video)
    shown = np.linspace(0, frames.shape[1] - 1, STRIP).round().astype(int)
    return {str(i): np.concatenate(list(video[shown]), 1) for i, video in enumerate(frames)}


def export(model: Transformer, config: TrainConfig, folder: Path) -> None:
    """Writes `folder`/pipeline: the transformer in bfloat16, and with `flow.components` a whole pipeline around it.

    Adapters are merged into it, and those that were trained also written alone into `folder`/lora. All hosts must call;
    the first writes.
    """
    out = folder / "pipeline"
    if config.lora is not None:
        lora.save(model, folder / "lora", lora.LoRAConfig.name, dtype=jnp.bfloat16)
        model = lora.merge(model)
    pretrained.save_model(model, model.config, out / "transformer", dtype=jnp.bfloat16)
    checkpoint = open_components(config)
    if jax.process_index():
        return
    if checkpoint is not None:
        for part in COPIED:
            shutil.copytree(checkpoint.folder / part, out / part, dirs_exist_ok=True)
        pretrained.write_config(checkpoint.scheduler, out / "scheduler", "scheduler_config.json")
        write_index(out, checkpoint.scheduler, checkpoint.variant)
    print(f"exported {out}", flush=True)
