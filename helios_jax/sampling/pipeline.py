"""`HeliosPipeline`: a diffusers folder in; prompts, an image or a video in; latents, frames or a stream out."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from helios_jax import pretrained
from helios_jax.diffusion.schedule import SchedulerConfig
from helios_jax.locations import location
from helios_jax.models.ops.choices import Attention, Implementations, Norms
from helios_jax.models.tokenizer import Tokenizer
from helios_jax.models.transformer import Transformer, TransformerConfig
from helios_jax.models.transformer.block import check_implementations
from helios_jax.models.umt5 import UMT5Encoder
from helios_jax.models.vae import AutoencoderKLWan
from helios_jax.runtime.compilation import compute_dtype
from helios_jax.sampling import sampler
from helios_jax.sampling.arguments import Prompt, check_output_type, make_negatives, make_prompts, make_seeds
from helios_jax.sampling.checkpoint import Checkpoint, write_index
from helios_jax.sampling.context import Context, encode_border, encode_context, read_context
from helios_jax.sampling.frames import decode, decode_video
from helios_jax.sampling.noise import Noise, SeededNoise
from helios_jax.sampling.options import PromptSwitch, SamplingOptions, takes_options
from helios_jax.sampling.plan import Plan, Variant, make_plan
from helios_jax.sampling.prompts import Schedule, make_schedule
from helios_jax.sampling.stream import Call, Stream, check_latents
from helios_jax.sampling.stream_state import State, read_state
from helios_jax.sampling.text import Texts, encode_prompts
from helios_jax.sharding import ContextAttention


@dataclass
class HeliosPipelineOutput:
    """`frames`: float32 [b, t, h, w, 3] in [0, 1], or the latents [b, t, h, w, c] for output_type="latent"."""

    frames: np.ndarray

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.frames, dtype)


@dataclass
class HeliosPipeline:
    """The Helios pipeline: diffusers' `HeliosPipeline` or `HeliosPyramidPipeline`, as the checkpoint's files say.

    ```python
    pipe = HeliosPipeline.from_pretrained("BestWishYsh/Helios-Base")
    frames = pipe("a cat bakes a cake", num_frames=132, seed=0).frames  # [1, 132, 384, 640, 3]
    for frames in pipe.stream("a cat bakes a cake", num_frames=None):  # uint8 [1, 33, 384, 640, 3], for ever
        ...
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
        transformer: str = "transformer",
        revision: str | None = None,
        dtype: Any = None,
        vae_dtype: Any = None,
        stacked: bool | None = None,
        offload_text_encoder: bool | None = None,
        attention: Attention | None = None,
        norms: Norms | None = None,
        mesh: jax.sharding.Mesh | None = None,
        context_attention: ContextAttention = "ulysses",
    ) -> "HeliosPipeline":
        """The pipeline in a diffusers folder, a hub repository (at a `revision`) or an opened checkpoint.

        `transformer` is the subfolder with the transformer: released repositories also hold those of other stages, such
        as transformer_ode. It may also be a folder elsewhere. `dtype` is for the transformer and the text encoder, by
        default bfloat16 on an accelerator and float32 on CPU. `vae_dtype` is the VAE's, by default `dtype` or, on CPU,
        float32. `stacked` keeps the transformer's blocks stacked and scans over them (the default on TPU), or keeps
        them as a list (elsewhere). With `offload_text_encoder` (the default where there is an accelerator) the text
        encoder, 11 GB of the released weights, waits in the host's memory and is on the device only while a prompt is
        encoded. `attention` and `norms` name the implementations in the transformer (docs/kernels.md), by default the
        device's best. With a `mesh` (`helios_jax.sharding.make_mesh`) each device gets its shard of every tensor; where
        the axis `context` splits the tokens, `context_attention` is the algorithm by which they attend to one another.

        Raises:
            ValueError: the `attention` or `norms` asked for cannot run here, or the mesh does not fit the heads.
            CheckpointError: something in the folder is missing, broken or does not fit, before weights are read.
        """
        checkpoint = (
            name if isinstance(name, Checkpoint) else Checkpoint.open(name, transformer=transformer, revision=revision)
        )
        backend = jax.default_backend()
        dtype = compute_dtype(dtype)
        stacked = backend == "tpu" if stacked is None else stacked
        implementations = Implementations(attention, norms, context_attention)
        check_implementations(implementations, checkpoint.transformer, dtype, mesh)
        vae_dtype = jnp.dtype(vae_dtype or (jnp.float32 if backend == "cpu" else dtype))
        offloaded = backend != "cpu" if offload_text_encoder is None else offload_text_encoder
        networks = checkpoint.load(dtype, vae_dtype, stacked, mesh, offloaded, implementations)
        return cls(*networks, checkpoint.tokenizer, checkpoint.scheduler, checkpoint.variant)

    def save_pretrained(self, folder: str | Path, *, dtype: Any = None, max_shard_size: int | str = "5GB") -> None:
        """Writes the pipeline, tensor by tensor, to a folder that this class and diffusers can load."""
        folder = location(folder)
        for name in ("transformer", "vae", "text_encoder"):
            model = getattr(self, name)
            more = self.variant.trained.entries() if name == "transformer" else None
            pretrained.save_model(
                model, model.config, folder / name, dtype=dtype, max_shard_size=max_shard_size, more=more
            )
        pretrained.write_config(self.scheduler, folder / "scheduler", "scheduler_config.json")
        self.tokenizer.save_pretrained(folder / "tokenizer")
        write_index(folder, self.scheduler, self.variant)

    def encode_prompt(self, prompts: Prompt, max_sequence_length: int | None = None) -> Float[Array, "b m d"]:
        """Text embeddings, zero past each prompt's end; as many positions as the tokenizer allows unless given."""
        return encode_prompts(self.text_encoder, self.tokenizer, make_prompts(prompts), max_sequence_length)

    def plan(self, options: SamplingOptions) -> Plan:
        """The plan of `options` for this checkpoint. Raises ValueError for an option that does not fit it."""
        return make_plan(self.transformer.config, self.vae.config, self.scheduler, self.variant, options)

    @takes_options
    def __call__(
        self,
        prompt: Prompt,
        negative_prompt: Prompt | None = None,
        *,
        image: Any = None,
        video: Any = None,
        switches: Sequence[PromptSwitch] = (),
        num_videos_per_prompt: int = 1,
        output_type: str = "np",
        seed: int | Sequence[int] = 0,
        noise: Noise | None = None,
        options: SamplingOptions | None = None,
        **changes: Any,
    ) -> HeliosPipelineOutput:
        """Videos of all prompts, all chunks in one program. Names and meanings are as in diffusers' pipelines.

        Args:
            prompt, negative_prompt: one string, or one per video.
            image: the picture that the videos begin with: a PIL image, an array [h, w, 3] or a file; or a list of one
                per prompt.
            video: the video that they continue: a list of PIL images, uint8 [t, h, w, 3] or a file, at least a chunk
                long. Without image and video the task is text to video.
            switches: prompts that take over at later chunks.
            num_videos_per_prompt: videos of each prompt, in a row.
            output_type: "np" for float32 frames [b, t, h, w, 3] in [0, 1]; "latent" for the latents [b, t, h, w, c] of
                whole chunks, without the history they began with.
            seed: the seed of each prompt's first video, from which the prompt's next videos count on; or one per video.
                A video does not depend on the others of its batch.
            noise: a source of random numbers in place of seeds, with `normal(site, shape)` and `uniform(site, shape)`.
            options: all options as one object; options given by name replace its values.

        Raises:
            ValueError: an argument cannot be used; the message names it, the rule and the remedy.
        """
        check_output_type(output_type)
        plan = self.plan((options or SamplingOptions()).changed(changes))
        if plan.num_chunks is None:
            raise ValueError("num_frames must be given: a video without end is a stream, see HeliosPipeline.stream")
        call = self.prepare(
            prompt,
            negative_prompt,
            plan,
            context=self.read_context(prompt, plan, image=image, video=video),
            switches=switches,
            num_videos_per_prompt=num_videos_per_prompt,
            seed=seed,
            noise=noise,
        )
        latents = self.generate(call)
        for chunk, part in enumerate(np.split(np.asarray(latents), plan.num_chunks or 1, axis=1)):
            check_latents(part, chunk)
        if output_type == "latent":
            return HeliosPipelineOutput(np.asarray(latents))
        return HeliosPipelineOutput(decode_video(self.vae, latents, plan, dtype="float32"))

    @takes_options
    def stream(
        self,
        prompt: Prompt,
        negative_prompt: Prompt | None = None,
        *,
        image: Any = None,
        video: Any = None,
        switches: Sequence[PromptSwitch] = (),
        num_videos_per_prompt: int = 1,
        output_type: str = "np",
        seed: int | Sequence[int] = 0,
        noise: Noise | None = None,
        progress: sampler.Progress | None = None,
        options: SamplingOptions | None = None,
        **changes: Any,
    ) -> Stream:
        """Makes a video chunk by chunk: an iterator of uint8 frames [b, t, h, w, 3] (or of latents).

        A chunk comes as soon as it is decoded, while the next one is computed; memory does not grow. The text can be
        changed on the way (`Stream.set_prompt`), and `Stream.save_state` writes a file that `resume` goes on from. The
        other arguments are those of `__call__`; `num_frames=None` never ends. `progress(chunk, step)`, if given, is
        called after every step, and the stream then waits for each step.
        """
        check_output_type(output_type)
        plan = self.plan((options or SamplingOptions()).changed(changes))
        call = self.prepare(
            prompt,
            negative_prompt,
            plan,
            context=self.read_context(prompt, plan, image=image, video=video),
            switches=switches,
            num_videos_per_prompt=num_videos_per_prompt,
            seed=seed,
            noise=noise,
        )
        return self.start(call, output_type, progress)

    def resume(
        self,
        path: str | PathLike,
        *,
        num_frames: int | None = None,
        switches: Sequence[PromptSwitch] | None = None,
        plan: Plan | None = None,
        output_type: str = "np",
        progress: sampler.Progress | None = None,
    ) -> Stream:
        """Continues the stream whose state is in `path`, bit for bit as if it had not stopped.

        `num_frames` gives the whole video another length. So may a `plan`, whose options must otherwise give the same
        video as the state's. `switches` replace the switches that were planned for later chunks.

        Raises:
            ValueError: the file is no such state, or was made with another checkpoint or other options, or a prompt
                would take over in a chunk that is made already.
        """
        check_output_type(output_type)
        state = read_state(path)
        if plan is not None:
            ours, theirs = dataclasses.asdict(plan.options), dataclasses.asdict(state.options)
            free = ("num_frames", "fps", "interpolation_steps", "video_fps")
            if differs := [f"{key} {theirs[key]}" for key in ours if key not in free and ours[key] != theirs[key]]:
                raise ValueError(f"{path}: made with other options ({', '.join(differs)}): give the same ones")
            num_frames = plan.options.num_frames
        check_identity(path, state, identity := self._identity())
        options = state.options if num_frames is None else dataclasses.replace(state.options, num_frames=num_frames)
        if plan is None or plan.options != options:
            plan = self.plan(options)
        prompts = state.prompts if switches is None else _with_switches(state, switches, plan)
        texts = self._texts(state.negatives, options)
        texts.encode([entry.prompts for entry in prompts.entries])
        call = Call(
            plan=plan,
            prompts=prompts,
            texts=texts,
            noise=state.noise,
            history=state.history,
            identity=identity,
            first=state.chunk,
            overlap=self.vae if options.overlap_chunks else None,
        )
        stream = self.start(call, output_type, progress)
        stream.about = state.about
        return stream

    def read_context(self, prompt: Prompt, plan: Plan, *, image: Any = None, video: Any = None) -> Context:
        """The pixels that videos of `prompt` begin with (`image`) or continue (`video`), for `prepare`."""
        return read_context(image, video, len(make_prompts(prompt)), plan, self.vae.config)

    def prepare(
        self,
        prompt: Prompt,
        negative_prompt: Prompt | None,
        plan: Plan,
        *,
        context: Context = None,
        switches: Sequence[PromptSwitch] = (),
        num_videos_per_prompt: int = 1,
        seed: int | Sequence[int] = 0,
        noise: Noise | None = None,
    ) -> Call:
        """Checks all arguments, encodes the prompts and the context; `generate` and `start` take what it returns."""
        prompts = make_prompts(prompt)
        negatives = make_negatives(negative_prompt, len(prompts))
        if num_videos_per_prompt < 1:
            raise ValueError(f"num_videos_per_prompt must be at least 1, got {num_videos_per_prompt}")
        seeds = make_seeds(seed, len(prompts), num_videos_per_prompt)
        prompts, negatives = ([p for p in some for _ in range(num_videos_per_prompt)] for some in (prompts, negatives))
        schedule = make_schedule(prompts, switches, plan.options, plan.frames)
        noise = SeededNoise(*seeds) if noise is None else noise
        context = None if context is None else context.repeated(num_videos_per_prompt)
        history = encode_context(self.vae, context, plan, noise, len(prompts))
        texts = self._texts(negatives if plan.guidance_scale is not None else (), plan.options)
        texts.encode([entry.prompts for entry in schedule.entries])
        call = Call(plan, schedule, texts, noise, history, self._identity())
        if not plan.options.overlap_chunks:
            return call
        begins = None if context is None else encode_border(self.vae, context, call.batch)
        return dataclasses.replace(call, overlap=self.vae, begins=begins)

    def generate(self, call: Call) -> Float[Array, "b t h w c"]:
        """The latents of all chunks. A first chunk with steps or a beginning unlike later ones has its own program."""
        assert call.plan.num_chunks is not None
        mixtures = [call.prompts.mixture(chunk) for chunk in range(call.first, call.plan.num_chunks)]
        noises = [call.chunk_noise() for _ in mixtures]
        apart = call.first == 0 and call.plan.first_levels is not call.plan.levels
        split = int(apart or (call.first == 0 and call.overlap is not None))
        history, parts = call.history, []
        for begin, end in ((0, split), (split, len(mixtures))):
            if begin == end:
                continue
            conditioning = call.conditioning(call.texts.kv(mixtures[begin]))
            texts = None
            if len(set(mixtures[begin:end])) > 1:
                texts = sampler.TextChanges(
                    jnp.stack([call.texts.embeddings(mixture) for mixture in mixtures[begin:end]]),
                    jnp.array([i > begin and mixtures[i] != mixtures[i - 1] for i in range(begin, end)]),
                )
            noise = jax.tree.map(lambda *x: jnp.stack(x), *noises[begin:end])
            levels = call.levels(call.first + begin)
            begins, overlap = (None, call.overlap) if call.first + begin else (call.begins, None)
            history, latents = sampler.generate(
                self.transformer, history, noise, conditioning, texts, levels, begins, overlap, memory=call.plan.memory
            )
            parts.append(latents)
        return jnp.concatenate(parts, 1)

    def start(self, call: Call, output_type: str = "np", progress: sampler.Progress | None = None) -> Stream:
        """The stream of a prepared call."""
        pixels = output_type == "np"
        finish: Callable = partial(decode, self.vae, dtype="uint8") if pixels else lambda latents: latents
        return Stream(self.transformer, call, finish, progress, pixels=pixels)

    def _texts(self, negatives: Sequence[str], options: SamplingOptions) -> Texts:
        embed = partial(self.encode_prompt, max_sequence_length=options.max_sequence_length)
        return Texts(embed, self.transformer, negatives)

    def _identity(self) -> dict[str, Any]:
        return identity_of(self.variant, self.transformer.config, self.transformer.dtype)


def identity_of(variant: Variant, config: TransformerConfig, dtype: Any) -> dict[str, Any]:
    """Identity of a checkpoint and precision, ready for JSON: a saved state resumes only where it is the same."""
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}
    return {"variant": variant.name, "transformer": plain, "precision": str(dtype)}


def check_identity(path: str | PathLike, state: State, identity: Mapping[str, Any]) -> None:
    """Raises ValueError if the state in `path` is of another checkpoint or precision than `identity`."""
    if differs := ", ".join(key for key in identity if state.identity.get(key) != identity[key]):
        raise ValueError(f"{path}: made with another checkpoint ({differs} differ): open the one it was made with")


def _with_switches(state: State, switches: Sequence[PromptSwitch], plan: Plan) -> Schedule:
    """A state's schedule up to its chunk, then `switches`. Raises ValueError for a switch before that chunk."""
    past = [entry for entry in state.prompts.entries if entry.chunk < state.chunk]
    prompts = past[-1].prompts if past else state.prompts.entries[0].prompts
    later = make_schedule(prompts, switches, plan.options, plan.frames).entries[1:]
    if later and later[0].chunk < state.chunk:
        raise ValueError(
            f"the switch to {later[0].prompts[0]!r} is in chunk {later[0].chunk}, which is made already: switch in"
            f" chunk {state.chunk} or later"
        )
    return Schedule((*(past or state.prompts.entries[:1]), *later))
