"""`HeliosPipeline`: a diffusers folder in, prompts in, latents or frames out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from helios_jax import pretrained
from helios_jax.diffusion import memory as memories
from helios_jax.diffusion.denoise import ChunkNoise, Conditioning, Level
from helios_jax.diffusion.memory import History
from helios_jax.diffusion.schedule import SchedulerConfig
from helios_jax.models import text as umt5
from helios_jax.models.text import UMT5Encoder
from helios_jax.models.tokenizer import Tokenizer
from helios_jax.models.transformer import Transformer
from helios_jax.models.vae import AutoencoderKLWan, denormalize
from helios_jax.sampling import sampler
from helios_jax.sampling.checkpoint import Checkpoint, write_index
from helios_jax.sampling.noise import Noise, SeededNoise, draw
from helios_jax.sampling.plan import HISTORY_SIZES, Plan, Variant, make_plan


@dataclass
class HeliosPipelineOutput:
    """`frames`: float32 [b, t, h, w, 3] in [0, 1], or the latents [b, t, h, w, c] for output_type="latent"."""

    frames: np.ndarray

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.frames, dtype)


@dataclass(frozen=True)
class Run:
    """Everything that a call's arguments decide, ready for the sampler."""

    plan: Plan
    history: History
    conditioning: Conditioning
    noise: Noise
    batch: int

    def chunks(self) -> Iterator[tuple[ChunkNoise, tuple[Level, ...]]]:
        """The noise of each chunk, drawn when it is asked for, and its levels."""

        def normal(site: str, shape: tuple[int, ...]) -> Array:
            shape = (self.batch, *shape)
            return jnp.asarray(draw(self.noise.normal(site, shape), shape, site))

        for chunk in range(self.plan.num_chunks):
            latents = normal("latents", self.plan.latent_shape)
            blocks = tuple(normal("block_noise", shape) for shape in self.plan.block_shapes())
            yield ChunkNoise(latents, blocks), self.plan.levels if chunk else self.plan.first_levels


@jax.jit
def encode_text(encoder: UMT5Encoder, ids: Array, mask: Array) -> Array:
    return umt5.encode(encoder, ids, mask)


@jax.jit
def text_kv(transformer: Transformer, embeddings: Array) -> Any:
    return transformer.text_kv(embeddings.astype(transformer.dtype))


@partial(jax.jit, static_argnames="dtype")
def decode(vae: AutoencoderKLWan, latents: Float[Array, "b t h w c"], *, dtype: str) -> Array:
    """One chunk's pixels: float32 in [0, 1], or uint8."""
    x = denormalize(latents, vae.config).astype(vae.post_quant_conv.weight.dtype)
    pixels = jnp.clip(vae.decode(x).astype(jnp.float32) / 2 + 0.5, 0, 1)
    return jnp.round(pixels * 255).astype(jnp.uint8) if dtype == "uint8" else pixels


@dataclass
class HeliosPipeline:
    """Text to video (diffusers' `HeliosPipeline` and `HeliosPyramidPipeline`: the checkpoint's files say which).

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
    variant: Variant = field(default_factory=Variant)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path | Checkpoint,
        *,
        dtype: Any = None,
        vae_dtype: Any = jnp.float32,
        stacked: bool | None = None,
    ) -> "HeliosPipeline":
        """The pipeline in a diffusers folder, a hub repository or an opened checkpoint.

        `dtype` is that of the transformer and the text encoder: bfloat16 where there is an accelerator and float32 on
        CPU unless given. The VAE stays float32 unless asked otherwise. `stacked` keeps transformer blocks stacked and
        scanned (the default on TPU) or as a list (elsewhere).

        Raises:
            CheckpointError: something in the folder is missing, broken or does not fit, before weights are read.
        """
        checkpoint = name if isinstance(name, Checkpoint) else Checkpoint.open(name)
        backend = jax.default_backend()
        dtype = jnp.dtype(dtype or (jnp.float32 if backend == "cpu" else jnp.bfloat16))
        stacked = backend == "tpu" if stacked is None else stacked
        networks = checkpoint.load(dtype, jnp.dtype(vae_dtype), stacked)
        return cls(*networks, checkpoint.tokenizer, checkpoint.scheduler, checkpoint.variant)

    def save_pretrained(self, folder: str | Path, *, dtype: Any = None) -> None:
        """Writes the pipeline as a folder that this class and diffusers load."""
        folder = Path(folder)
        pretrained.save_model(self.transformer, self.transformer.config, folder / "transformer", dtype=dtype)
        pretrained.save_model(self.vae, self.vae.config, folder / "vae", dtype=dtype)
        pretrained.save_model(self.text_encoder, self.text_encoder.config, folder / "text_encoder", dtype=dtype)
        pretrained.write_config(self.scheduler, folder / "scheduler", "scheduler_config.json")
        self.tokenizer.save_pretrained(folder / "tokenizer")
        write_index(folder, self.scheduler, self.variant)

    def encode_prompt(self, prompts: Sequence[str], max_sequence_length: int | None = None) -> Float[Array, "b m d"]:
        """Text embeddings, zero past each prompt's end; as many positions as the tokenizer allows unless given."""
        length = min(512, self.tokenizer.max_length) if max_sequence_length is None else max_sequence_length
        if length < 1:
            raise ValueError(f"max_sequence_length must be at least 1, got {length}")
        ids, mask = self.tokenizer(list(prompts), length)
        return encode_text(self.text_encoder, jnp.asarray(ids), jnp.asarray(mask))

    def prepare(
        self,
        prompts: Sequence[str],
        negative_prompts: Sequence[str],
        plan: Plan,
        *,
        max_sequence_length: int | None = None,
        seed: int = 0,
        noise: Noise | None = None,
    ) -> Run:
        """Encodes the prompts of a call; the rest of its arguments are in `plan`."""
        scale = None if plan.guidance_scale is None else jnp.asarray(plan.guidance_scale, jnp.float32)
        embeddings = self.encode_prompt(
            prompts if scale is None else [*prompts, *negative_prompts], max_sequence_length
        )
        _, h, w, c = plan.latent_shape
        return Run(
            plan=plan,
            history=memories.empty(plan.memory, len(prompts), h, w, c),
            conditioning=Conditioning(text_kv(self.transformer, embeddings), scale, plan.zero_star),
            noise=SeededNoise(seed) if noise is None else noise,
            batch=len(prompts),
        )

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        height: int = 384,
        width: int = 640,
        num_frames: int = 132,
        num_inference_steps: int | None = None,
        pyramid_num_inference_steps_list: Sequence[int] | None = None,
        guidance_scale: float | None = None,
        use_zero_init: bool = True,
        zero_steps: int = 1,
        is_amplify_first_chunk: bool = False,
        history_sizes: Sequence[int] = HISTORY_SIZES,
        num_latent_frames_per_chunk: int = 9,
        max_sequence_length: int | None = None,
        output_type: str = "np",
        seed: int = 0,
        noise: Noise | None = None,
    ) -> HeliosPipelineOutput:
        """A video per prompt, all chunks in one program. Names and meanings are those of diffusers' pipelines.

        Args:
            prompt, negative_prompt: one string, or one per video.
            height, width: pixels; multiples of 16 for Base and of 64 for the released pyramid weights.
            num_frames: pixel frames, exactly as many are returned.
            num_inference_steps: steps a chunk of a Base checkpoint, by default 50.
            pyramid_num_inference_steps_list: steps per level of a pyramid checkpoint, coarsest first, by default
                20, 20, 20 for Mid and 2, 2, 2 for Distilled.
            guidance_scale: classifier-free guidance, by default 5 (Distilled: none); off at 1 and below.
            use_zero_init, zero_steps: with CFG-Zero*, steps 0 to zero_steps of the first level stand still.
            is_amplify_first_chunk: twice the steps for the first chunk (Distilled).
            history_sizes: latent frames of the long, mid and short history.
            max_sequence_length: positions of the text; by default what the tokenizer allows, 512 at most.
            output_type: "np" for float32 frames [b, t, h, w, 3] in [0, 1]; "latent" for the latents [b, t, h, w, c] of
                whole chunks, without the history they began with.
            seed, noise: where random numbers come from; `noise` has `normal(site, shape)` and `uniform(site, shape)`.

        Raises:
            ValueError: an argument cannot be; the message names it, the rule and the remedy.
        """
        if output_type not in ("np", "latent"):
            raise ValueError(f'output_type must be "np" or "latent", got {output_type!r}')
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        negatives = _negatives(negative_prompt, len(prompts))
        plan = make_plan(
            self.transformer.config,
            self.vae.config,
            self.scheduler,
            self.variant,
            height=height,
            width=width,
            num_frames=num_frames,
            num_inference_steps=num_inference_steps,
            pyramid_num_inference_steps_list=pyramid_num_inference_steps_list,
            guidance_scale=guidance_scale,
            use_zero_init=use_zero_init,
            zero_steps=zero_steps,
            is_amplify_first_chunk=is_amplify_first_chunk,
            history_sizes=history_sizes,
            num_latent_frames_per_chunk=num_latent_frames_per_chunk,
        )
        run = self.prepare(
            prompts,
            negatives,
            plan,
            max_sequence_length=max_sequence_length,
            seed=seed,
            noise=noise,
        )
        latents = self._generate(run)
        if output_type == "latent":
            return HeliosPipelineOutput(np.asarray(latents))
        # A chunk is decoded on its own: its first latent frame is an image's.
        parts = jnp.split(latents, plan.num_chunks, axis=1)
        frames = np.concatenate([np.asarray(decode(self.vae, part, dtype="float32")) for part in parts], 1)
        return HeliosPipelineOutput(frames[:, :num_frames])

    def _generate(self, run: Run) -> Float[Array, "b t h w c"]:
        """The latents of all chunks; a first chunk with steps of its own is a program of its own."""
        plan, chunks = run.plan, list(run.chunks())
        split = 0 if plan.first_levels is plan.levels else 1
        history, parts = run.history, []
        for some in (chunks[:split], chunks[split:]):
            if some:
                noise = jax.tree.map(lambda *x: jnp.stack(x), *(noise for noise, _ in some))
                history, latents = sampler.generate(
                    self.transformer, history, noise, run.conditioning, some[0][1], memory=plan.memory
                )
                parts.append(latents)
        return jnp.concatenate(parts, 1)

    def stream(self, run: Run, progress: sampler.Progress | None = None) -> Iterator[np.ndarray]:
        """Yields uint8 frames [b, t, h, w, 3] chunk by chunk while the next chunk is computed; `run` is `prepare`'s.

        The chunks together have exactly the frames that were asked for. `progress(chunk, step)` is called after every
        step.
        """
        left = run.plan.num_frames
        chunks = sampler.stream(
            self.transformer,
            run.history,
            run.chunks(),
            run.conditioning,
            memory=run.plan.memory,
            finish=partial(decode, self.vae, dtype="uint8"),
            progress=progress,
        )
        for frames in chunks:
            yield np.asarray(frames)[:, :left]
            left -= min(left, frames.shape[1])


def _negatives(negative_prompt: str | Sequence[str] | None, count: int) -> list[str]:
    if negative_prompt is None or isinstance(negative_prompt, str):
        return [negative_prompt or ""] * count
    if len(negative_prompt) != count:
        raise ValueError(
            f"{len(negative_prompt)} negative prompts for {count} prompts: give as many, or one string for all"
        )
    return list(negative_prompt)
