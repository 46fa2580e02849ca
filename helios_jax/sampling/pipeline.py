"""`HeliosPipeline`: a diffusers folder in, prompts in, latents or frames out."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from helios_jax import pretrained
from helios_jax.diffusion import memory as history_memory
from helios_jax.diffusion.denoise import Conditioning
from helios_jax.diffusion.memory import History, MemoryConfig
from helios_jax.diffusion.schedule import SchedulerConfig, sigmas
from helios_jax.diffusion.solvers import Steps, make_steps
from helios_jax.models import text as umt5
from helios_jax.models.text import UMT5Config, UMT5Encoder
from helios_jax.models.tokenizer import Tokenizer
from helios_jax.models.transformer import Transformer, TransformerConfig
from helios_jax.models.vae import AutoencoderKLWan, VAEConfig, denormalize
from helios_jax.pretrained import CheckpointError
from helios_jax.sampling import sampler
from helios_jax.sampling.noise import Noise, SeededNoise, draw

HISTORY_SIZES = (16, 2, 1)


@dataclass
class HeliosPipelineOutput:
    """`frames`: float32 [b, t, h, w, 3] in [0, 1], or the latents [b, t, h, w, c] for output_type="latent"."""

    frames: np.ndarray

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.frames, dtype)


@dataclass(frozen=True)
class Run:
    """Everything that a call's arguments decide, ready for the sampler."""

    history: History
    conditioning: Conditioning
    steps: Steps
    memory: MemoryConfig
    noise: Noise
    chunk_shape: tuple[int, ...]
    num_chunks: int
    num_frames: int

    def draws(self) -> Iterator[Array | np.ndarray]:
        """The noise of each chunk, drawn when it is asked for."""
        for _ in range(self.num_chunks):
            yield draw(self.noise.normal("latents", self.chunk_shape), self.chunk_shape, "latents")


@jax.jit
def encode_text(encoder: UMT5Encoder, ids: Array, mask: Array) -> Array:
    return umt5.encode(encoder, ids, mask)


@jax.jit
def text_kv(transformer: Transformer, embeddings: Array) -> Any:
    return transformer.text_kv(embeddings.astype(transformer.patch_embedding.weight.dtype))


@partial(jax.jit, static_argnames="dtype")
def decode(vae: AutoencoderKLWan, latents: Float[Array, "b t h w c"], *, dtype: str) -> Array:
    """One chunk's pixels: float32 in [0, 1], or uint8."""
    x = denormalize(latents, vae.config).astype(vae.decoder.conv_in.weight.dtype)
    pixels = jnp.clip(vae.decode(x).astype(jnp.float32) / 2 + 0.5, 0, 1)
    return jnp.round(pixels * 255).astype(jnp.uint8) if dtype == "uint8" else pixels


@dataclass
class HeliosPipeline:
    """Text to video with a Base checkpoint (diffusers' `HeliosPipeline`).

    ```python
    pipe = HeliosPipeline.from_pretrained("BestWishYsh/Helios-Base")
    frames = pipe("a cat bakes a cake", num_frames=132, seed=0).frames  # [1, 132, 384, 640, 3]
    ```
    """

    transformer: Transformer
    vae: AutoencoderKLWan
    text_encoder: UMT5Encoder
    tokenizer: Tokenizer
    scheduler: SchedulerConfig

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, dtype: Any = None, vae_dtype: Any = jnp.float32, stacked: bool | None = None
    ) -> "HeliosPipeline":
        """The pipeline in a diffusers folder or a hub repository.

        `dtype` is that of the transformer and the text encoder: bfloat16 where there is an accelerator and float32 on
        CPU unless given. The VAE stays float32 unless asked otherwise. `stacked` keeps transformer blocks stacked and
        scanned (the default on TPU) or as a list (elsewhere).

        Raises:
            CheckpointError: something in the folder is missing, broken or does not fit, before weights are read.
        """
        backend = jax.default_backend()
        dtype = jnp.dtype(dtype or (jnp.float32 if backend == "cpu" else jnp.bfloat16))
        stacked = backend == "tpu" if stacked is None else stacked
        folder = pretrained.resolve(name)
        kind = pretrained.read_json(folder / "model_index.json").get("_class_name")
        if kind != "HeliosPipeline":
            raise CheckpointError(f"{folder}/model_index.json names a {kind}: only HeliosPipeline (Base) is supported")

        scheduler = pretrained.read_config(folder / "scheduler", SchedulerConfig, "scheduler_config.json")
        _check_scheduler(scheduler, folder)
        tokenizer = Tokenizer.from_pretrained(folder / "tokenizer")
        config = pretrained.read_config(folder / "transformer", TransformerConfig)
        transformer = Transformer.abstract(config, stacked=stacked)
        vae_config = pretrained.read_config(folder / "vae", VAEConfig)
        vae = nnx.eval_shape(lambda: AutoencoderKLWan(vae_config, rngs=nnx.Rngs(0)))
        text_config = pretrained.read_config(folder / "text_encoder", UMT5Config)
        text_encoder = nnx.eval_shape(lambda: UMT5Encoder(text_config, rngs=nnx.Rngs(0)))
        _check_fit(config, vae_config, text_config, folder)

        parts = {"transformer": transformer, "vae": vae, "text_encoder": text_encoder}
        for part, model in parts.items():
            pretrained.check_weights(model, folder / part)
        return cls(
            transformer=pretrained.load_model(transformer, folder / "transformer", dtype=dtype),
            vae=pretrained.load_model(vae, folder / "vae", dtype=vae_dtype),
            text_encoder=pretrained.load_model(text_encoder, folder / "text_encoder", dtype=dtype),
            tokenizer=tokenizer,
            scheduler=scheduler,
        )

    def save_pretrained(self, folder: str | Path, *, dtype: Any = None) -> None:
        """Writes the pipeline as a folder that this class and diffusers load."""
        folder = Path(folder)
        pretrained.save_model(self.transformer, self.transformer.config, folder / "transformer", dtype=dtype)
        pretrained.save_model(self.vae, self.vae.config, folder / "vae", dtype=dtype)
        pretrained.save_model(self.text_encoder, self.text_encoder.config, folder / "text_encoder", dtype=dtype)
        pretrained.write_config(self.scheduler, folder / "scheduler", "scheduler_config.json")
        self.tokenizer.save_pretrained(folder / "tokenizer")
        pretrained.write_index(folder)

    def encode_prompt(self, prompts: Sequence[str], max_sequence_length: int = 512) -> Float[Array, "b m d"]:
        """Text embeddings, zero past each prompt's end."""
        ids, mask = self.tokenizer(list(prompts), max_sequence_length)
        return encode_text(self.text_encoder, jnp.asarray(ids), jnp.asarray(mask))

    def prepare(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        height: int = 384,
        width: int = 640,
        num_frames: int = 132,
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
        history_sizes: Sequence[int] = HISTORY_SIZES,
        num_latent_frames_per_chunk: int = 9,
        max_sequence_length: int = 512,
        seed: int = 0,
        noise: Noise | None = None,
    ) -> Run:
        """Checks the arguments of a call and encodes its prompts. Arguments are those of `__call__`."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        negative = "" if negative_prompt is None else negative_prompt
        negatives = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
        if not prompts or len(negatives) != len(prompts):
            raise ValueError(
                f"{len(negatives)} negative prompts for {len(prompts)} prompts: give as many, or one string for all"
            )
        config, spatial = self.transformer.config, self.vae.config.scale_factor_spatial
        check_size(height, width, multiple=spatial * math.lcm(*config.patch_size[1:]))
        for name, value in {
            "num_frames": num_frames,
            "num_inference_steps": num_inference_steps,
            "max_sequence_length": max_sequence_length,
        }.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if len(history_sizes) != 3:
            raise ValueError(f"history_sizes must be three numbers (long, mid, short), got {list(history_sizes)}")
        long, mid, recent = sorted(history_sizes, reverse=True)
        memory = MemoryConfig(long=long, mid=mid, recent=recent, frames_per_chunk=num_latent_frames_per_chunk)

        guided = guidance_scale > 1
        embeddings = self.encode_prompt([*prompts, *negatives] if guided else prompts, max_sequence_length)
        conditioning = Conditioning(
            text_kv(self.transformer, embeddings), jnp.asarray(guidance_scale, jnp.float32) if guided else None
        )
        b, t, h, w = len(prompts), memory.frames_per_chunk, height // spatial, width // spatial
        window = (t - 1) * self.vae.config.scale_factor_temporal + 1
        tokens = t * h * w // math.prod(config.patch_size)
        return Run(
            history=history_memory.empty(memory, b, h, w, config.in_channels),
            conditioning=conditioning,
            steps=make_steps(self.scheduler, sigmas(self.scheduler, num_inference_steps, tokens)),
            memory=memory,
            noise=SeededNoise(seed) if noise is None else noise,
            chunk_shape=(b, t, h, w, config.in_channels),
            num_chunks=-(-num_frames // window),
            num_frames=num_frames,
        )

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        height: int = 384,
        width: int = 640,
        num_frames: int = 132,
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
        history_sizes: Sequence[int] = HISTORY_SIZES,
        num_latent_frames_per_chunk: int = 9,
        max_sequence_length: int = 512,
        output_type: Literal["np", "latent"] = "np",
        seed: int = 0,
        noise: Noise | None = None,
    ) -> HeliosPipelineOutput:
        """A video per prompt, all chunks in one program. Names and meanings are those of diffusers' HeliosPipeline.

        Args:
            prompt, negative_prompt: one string, or one per video.
            height, width: pixels; multiples of 16 for the released weights.
            num_frames: pixel frames, exactly as many are returned.
            guidance_scale: classifier-free guidance; off at 1 and below.
            history_sizes: latent frames of the long, mid and short history.
            output_type: "np" for float32 frames [b, t, h, w, 3] in [0, 1]; "latent" for the latents [b, t, h, w, c] of
                whole chunks, without the history they began with.
            seed, noise: where random numbers come from; `noise` has `normal(site, shape)` and `uniform(site, shape)`.

        Raises:
            ValueError: an argument cannot be; the message names it, the rule and the remedy.
        """
        if output_type not in ("np", "latent"):
            raise ValueError(f'output_type must be "np" or "latent", got {output_type!r}')
        run = self.prepare(
            prompt,
            negative_prompt,
            height,
            width,
            num_frames,
            num_inference_steps,
            guidance_scale,
            history_sizes,
            num_latent_frames_per_chunk,
            max_sequence_length,
            seed,
            noise,
        )
        chunks = jnp.stack([jnp.asarray(x) for x in run.draws()])
        _, latents = sampler.generate(
            self.transformer, run.history, chunks, run.conditioning, run.steps, memory=run.memory
        )
        if output_type == "latent":
            return HeliosPipelineOutput(np.asarray(latents))
        # A chunk is decoded on its own: its first latent frame is an image's.
        pixels = [
            np.asarray(decode(self.vae, chunk, dtype="float32")) for chunk in jnp.split(latents, run.num_chunks, axis=1)
        ]
        return HeliosPipelineOutput(np.concatenate(pixels, 1)[:, :num_frames])

    def stream(self, run: Run, progress: sampler.Progress | None = None) -> Iterator[np.ndarray]:
        """Yields uint8 frames [b, t, h, w, 3] chunk by chunk while the next chunk is computed; `run` is `prepare`'s.

        The chunks together have exactly the frames that were asked for. `progress(chunk, step)` is called after every
        step.
        """
        left = run.num_frames
        chunks = sampler.stream(
            self.transformer,
            run.history,
            run.draws(),
            run.conditioning,
            run.steps,
            memory=run.memory,
            finish=partial(decode, self.vae, dtype="uint8"),
            progress=progress,
        )
        for frames in chunks:
            yield np.asarray(frames)[:, :left]
            left -= min(left, frames.shape[1])


def check_size(height: int, width: int, multiple: int) -> None:
    """Raises ValueError unless both sizes are positive multiples; names the nearest that are."""
    for name, value in {"height": height, "width": width}.items():
        if value < multiple or value % multiple:
            below = max(multiple, value // multiple * multiple)
            near = f"{below} or {below + multiple}" if value > multiple else f"{multiple}"
            raise ValueError(f"{name} must be a multiple of {multiple}, got {value}: the nearest are {near}")


def _check_scheduler(scheduler: SchedulerConfig, folder: Path) -> None:
    if scheduler.stages != 1:
        raise CheckpointError(f"{folder}/scheduler: stages is {scheduler.stages}, but a HeliosPipeline (Base) has 1")
    if scheduler.scheduler_type == "dmd":
        raise CheckpointError(
            f"{folder}/scheduler: a HeliosPipeline (Base) needs scheduler_type euler or unipc, not dmd"
        )


def _check_fit(transformer: TransformerConfig, vae: VAEConfig, text: UMT5Config, folder: Path) -> None:
    if transformer.in_channels != vae.z_dim:
        raise CheckpointError(
            f"{folder}: transformer in_channels {transformer.in_channels} is not vae z_dim {vae.z_dim}"
        )
    if transformer.text_dim != text.d_model:
        raise CheckpointError(
            f"{folder}: transformer text_dim {transformer.text_dim} is not text_encoder d_model {text.d_model}"
        )
