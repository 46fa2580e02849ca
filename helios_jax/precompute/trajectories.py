"""ODE pairs: points of a teacher's sampling trajectory at the student's few times, and the trajectory's end.

The teacher (Mid) samples videos from prompts, chunk by chunk with its own past as history, over a pyramid with many
steps a level. At each level its steps include the times at which the student (Distilled) will denoise. Stored of each
chunk are the latents at those times, the result of each level, and the history that the chunk was made from.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from helios_jax import sharding
from helios_jax.data import records
from helios_jax.diffusion.denoise import ChunkNoise, Conditioning, Level, record_chunk
from helios_jax.diffusion.levels import Trajectory, make_trajectory
from helios_jax.diffusion.memory import History, MemoryConfig, push
from helios_jax.diffusion.pyramid import level_shapes
from helios_jax.diffusion.schedule import Shift
from helios_jax.models.transformer import Transformer
from helios_jax.precompute.encode import NEGATIVE_PROMPT, local_mesh
from helios_jax.precompute.prompt_files import Prompt
from helios_jax.runtime.compilation import compute_dtype
from helios_jax.runtime.program import program
from helios_jax.runtime.seeds import check_seed
from helios_jax.sampling.checkpoint import Checkpoint
from helios_jax.sampling.fingerprint import weights_hash
from helios_jax.sampling.options import SamplingOptions
from helios_jax.sampling.pipeline import HeliosPipeline
from helios_jax.sampling.plan import Plan, make_plan


@dataclass(frozen=True)
class Settings:
    """Sampling settings of the teacher, with the names and values of upstream's get_ode-pairs.py.

    Attributes:
        height, width, num_frames: of the videos, in pixels.
        steps: the teacher's steps at each level, coarsest first.
        student_steps: the student's; twice as many in the first chunk with `amplify_first_chunk`.
        time_shift_type: of the dynamic shift that teacher and student share; None: no shift.
        guidance_scale, negative_prompt: classifier-free guidance.
        num_latent_frames_per_chunk: None: as the teacher was trained. The memory is always as it was trained.
        cfg_zero_star: CFG-Zero* guidance, whose first steps have zero velocity.
        seed: of the first prompt's noise; each next prompt adds 1 (upstream gives every prompt the same noise).
    """

    height: int = 384
    width: int = 640
    num_frames: int = 165
    steps: tuple[int, ...] = (20, 20, 20)
    student_steps: tuple[int, ...] = (2, 2, 2)
    amplify_first_chunk: bool = True
    time_shift_type: Shift = "linear"
    guidance_scale: float = 5.0
    negative_prompt: str = NEGATIVE_PROMPT
    cfg_zero_star: bool = False
    num_latent_frames_per_chunk: int | None = None
    seed: int = 42

    def __post_init__(self):
        check_seed(self.seed, "--seed")
        for name in ("steps", "student_steps"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: every level needs at least 1")
        if len(self.steps) != len(self.student_steps):
            raise ValueError(
                f"--student-steps {self.student_steps} are {len(self.student_steps)} levels, the teacher's --steps "
                f"{self.steps} are {len(self.steps)}: give as many"
            )


@program(static_argnames=("places", "memory"))
def denoise_trajectory(
    model: Transformer,
    history: History,
    noise: ChunkNoise,
    conditioning: Conditioning,
    levels: Sequence[Level],
    places: tuple[tuple[int, ...], ...],
    memory: MemoryConfig,
) -> tuple[History, list[Float[Array, "steps b t h w c"]]]:
    """Denoises the next chunk; returns the history after it, and the kept samples of each level.

    Kept are the samples at the start of the steps numbered `places`, then the level's result.
    """
    latents, kept = record_chunk(model, history, noise, conditioning, levels, memory, places)
    return push(history, latents, memory), kept


class Teacher:
    """A pyramid checkpoint that samples as `settings` say, `batch` prompts at a time for each copy of the model.

    Raises CheckpointError or ValueError, before weights are read, for a checkpoint or settings that cannot be used.
    """

    def __init__(self, checkpoint: Checkpoint, settings: Settings, *, batch: int = 1, tensor: int = 1):
        kind = checkpoint.variant
        if not kind.pyramid or kind.is_distilled:
            raise ValueError(f"{checkpoint.folder} is {kind.name}: the teacher of ODE pairs is a Mid checkpoint")
        if batch < 1:
            raise ValueError(f"--batch is {batch}: it must be at least 1")
        self.settings, self.checkpoint = settings, checkpoint
        self._batch, self._tensor = batch, tensor
        shift = settings.time_shift_type
        self._scheduler = dataclasses.replace(
            checkpoint.scheduler,
            shift=checkpoint.scheduler.shift if shift is None else 1.0,
            use_dynamic_shifting=shift is not None,
            time_shift_type=shift or checkpoint.scheduler.time_shift_type,
        )
        self._variant = dataclasses.replace(kind, is_cfg_zero_star=settings.cfg_zero_star)
        options = SamplingOptions(
            height=settings.height,
            width=settings.width,
            num_frames=settings.num_frames,
            pyramid_num_inference_steps_list=list(settings.steps),
            guidance_scale=settings.guidance_scale,
            num_latent_frames_per_chunk=settings.num_latent_frames_per_chunk,
        )
        parts = checkpoint.transformer, checkpoint.vae, self._scheduler, self._variant
        self.plan: Plan = make_plan(*parts, options)
        self.trajectories = [self._trajectory(1 + settings.amplify_first_chunk), self._trajectory(1)]

    def _trajectory(self, factor: int) -> Trajectory:
        tokens = math.prod(self.plan.latent_shape[:3]) // math.prod(self.checkpoint.transformer.patch_size)
        counts = [factor * count for count in self.settings.student_steps]
        return make_trajectory(self._scheduler, self.settings.steps, counts, tokens, self.plan.zero_init)

    def load(self) -> "Teacher":
        """Reads the weights, float32 on CPU and bfloat16 elsewhere. Raises ValueError if `tensor` does not fit."""
        self._mesh = local_mesh(self._tensor)
        self.batch = self._batch * self._mesh.shape["data"]
        dtype = compute_dtype()
        stacked = jax.default_backend() == "tpu"
        self._pipeline = HeliosPipeline(
            self.checkpoint.load_transformer(dtype, stacked=stacked, mesh=self._mesh),
            self.checkpoint.abstract_vae(),
            self.checkpoint.load_text_encoder(dtype, mesh=self._mesh),
            self.checkpoint.tokenizer,
            self._scheduler,
            self._variant,
        )
        return self

    def facts(self) -> dict[str, Any]:
        """The settings that decide the pairs, ready for JSON, which the training of a student checks."""
        levels = {"stage_range": self._scheduler.stage_range, "gamma": self._scheduler.gamma}
        return {"settings": asdict(self.settings), "memory": asdict(self.plan.memory), "levels": levels}

    def identity(self) -> str:
        """Identifies the teacher's weights."""
        return weights_hash([self.checkpoint.transformer_folder, self.checkpoint.folder / "text_encoder"])

    def text(self, prompts: Sequence[str]) -> np.ndarray:
        """Text embeddings of the prompts, float16 [b, m, d]."""
        return np.asarray(self._pipeline.encode_prompt(list(prompts)).astype(jnp.float16))

    def features(self) -> dict[str, Any]:
        """The features of a record; levels are counted from the coarsest."""
        _, h, w, c = self.plan.latent_shape
        width = self.checkpoint.text_encoder.d_model
        features = {
            "history": records.tensor((self.plan.memory.frames, h, w, c), np.float16),
            "anchor": records.tensor((1, h, w, c), np.float16),
            "chunk": records.tensor((), np.int32),
            "text": records.tensor((self.checkpoint.tokenizer.max_length, width), np.float16),
            "caption": records.text(),
            "id": records.text(),
        }
        for i, shape in enumerate(level_shapes(self.plan.latent_shape, len(self.settings.steps))):
            features[f"latents_{i}"] = records.tensor((None, *shape), np.float16)
            features[f"timesteps_{i}"] = records.tensor((None,), np.float32)
            features[f"sigmas_{i}"] = records.tensor((None,), np.float32)
        return features

    def __call__(self, prompts: Sequence[Prompt]) -> Iterator[list[records.Example]]:
        """The chunks of each prompt's video."""
        for i in range(0, len(prompts), self.batch):
            yield from self._sample(prompts[i : i + self.batch])

    def _sample(self, group: Sequence[Prompt]) -> list[list[records.Example]]:
        full = [*group, *[group[-1]] * (self.batch - len(group))]
        call = self._pipeline.prepare(
            [prompt.caption for prompt in full],
            self.settings.negative_prompt,
            self.plan,
            seed=[self.settings.seed + prompt.number for prompt in full],
        )
        conditioning = call.conditioning(call.texts.kv(call.prompts.mixture(0)))
        texts = self.text([prompt.caption for prompt in full])
        history = self._split(call.history)
        made: list[list[records.Example]] = [[] for _ in group]
        for chunk in range(self.plan.num_chunks or 0):
            trajectory = self.trajectories[min(chunk, 1)]
            noise = self._split(call.chunk_noise())
            before = history
            history, kept = denoise_trajectory(
                self._pipeline.transformer,
                history,
                noise,
                conditioning,
                trajectory.levels,
                places=trajectory.places,
                memory=self.plan.memory,
            )
            shared: Mapping[str, Any] = {
                "chunk": np.int32(chunk),
                **{f"timesteps_{i}": x for i, x in enumerate(trajectory.timesteps)},
                **{f"sigmas_{i}": x for i, x in enumerate(trajectory.sigmas)},
            }
            latents = [np.asarray(level, np.float16) for level in kept]
            past, anchor = np.asarray(before.latents, np.float16), np.asarray(before.anchor, np.float16)
            for b, prompt in enumerate(group):
                example = {f"latents_{i}": level[:, b] for i, level in enumerate(latents)}
                example |= {"history": past[b], "anchor": anchor[b], "text": texts[b]}
                made[b].append({**example, **shared, "caption": prompt.caption, "id": f"{prompt.id}_{chunk}"})
        return made

    def _split(self, tree: Any) -> Any:
        """Splits arrays of a batch over the copies of the model on this host."""
        place = sharding.batch_sharding(self._mesh)
        return jax.tree.map(lambda x: jax.device_put(x, place) if jnp.ndim(x) else x, tree)
