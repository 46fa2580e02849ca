"""Trains the Wan autoencoder on clips of pixels, then measures its latents and exports it.

A batch is `video`, uint8 [b, t, h, w, 3]. The loss is the squared error of the pixels and of the differences between
neighbouring ones, a share of the absolute error of both, and a small KL term; latents are sampled, which smooths the
space the transformer works in.
"""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key
from PIL import Image

from helios_jax import pretrained
from helios_jax.config import ConfigError, require
from helios_jax.data.loader import Example, Transform, clip_transform
from helios_jax.data.records import open_source
from helios_jax.locations import replacing
from helios_jax.models.layers import Conv
from helios_jax.models.vae import (
    AttentionBlock,
    AutoencoderKLWan,
    Downsample,
    ResidualBlock,
    Upsample,
    VAEConfig,
)
from helios_jax.sharding import gather
from helios_jax.training.run_config import DataConfig, TrainConfig
from helios_jax.training.stage import Batches, Metrics, Stage, host_batches
from helios_jax.training.training_data import Axis, Field, check_record, one_of_each, open_records

CHUNK = 33  # frames that are encoded together when videos are made; latents are measured on chunks of this length
STATISTICS_CLIPS = 256
TEST_CLIPS = 32
STEP = 8  # pixels per latent, in height and in width
MAKE = "python -m helios_jax.toy.build --out data/toy"


@dataclass
class ClipConfig(DataConfig):
    """Clips of pixels: `frames` of a video, and a random square of `crop` pixels of them."""

    frames: int = 33  # 1 + a multiple of 4
    crop: int | None = None  # null: whole frames

    def __post_init__(self):
        super().__post_init__()
        require(
            self.frames > 0 and self.frames % 4 == 1,
            f"frames must be 1 + a multiple of 4 (the VAE's step in time), got {self.frames}; try 9, 17 or 33",
        )
        require(
            self.crop is None or (self.crop > 0 and self.crop % STEP == 0),
            f"crop must be a multiple of {STEP} (the VAE's step in space), got {self.crop}; try 32 or 64",
        )


@dataclass
class ReconstructionConfig:
    """Weights of the terms that are added to the mean squared error of the pixels."""

    l1: float = 0.1  # mean absolute error
    edge: float = 0.5  # both errors of the differences between neighbouring pixels: sharp outlines
    kl: float = 1e-6
    first_frame: float = 1.0  # weight of a clip's first frame; the other frames have 1

    def __post_init__(self):
        for name, weight in dataclasses.asdict(self).items():
            require(weight >= 0, f"{name} must not be negative, got {weight}")


@dataclass
class VAETrainConfig(TrainConfig):
    """A run that trains the autoencoder."""

    stage: str = "vae"
    # A run never replaces a part of its config, so a narrower type is safe.
    data: ClipConfig = field(default_factory=ClipConfig)  # pyright: ignore[reportIncompatibleVariableOverride]
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)

    def __post_init__(self):
        super().__post_init__()
        require(
            self.validation is None,
            "validation must be null: the vae stage makes no videos of prompts, its export shows reconstructions",
        )
        require(self.mesh.context == 1, "mesh.context must be 1: the autoencoder has no tokens to split")


class VAEStage(Stage[VAETrainConfig, AutoencoderKLWan]):
    """The autoencoder on clips."""

    Config = VAETrainConfig

    def init(self, key: Key[Array, ""]) -> AutoencoderKLWan:
        """Random parameters of `config.model.vae`."""
        sizes = self._sizes()
        model = AutoencoderKLWan(sizes, rngs=nnx.Rngs(key))
        _start_plain(model)
        # Sampling noise as large as the latents would drown a new encoder's signal: its deviation starts at a seventh.
        bias = model.quant_conv.bias
        bias[...] = bias[...].at[sizes.z_dim :].set(-4.0)
        return model

    def load(self, model: AutoencoderKLWan, shardings: Any = None) -> AutoencoderKLWan:
        """The abstract `model` with the weights in `config.init`/vae, or in `config.init` itself."""
        folder = pretrained.resolve(self.config.init or "", (".", "vae"))
        part = folder / "vae" if (folder / "vae").is_dir() else folder
        sizes = "model.vae of this run's config"
        return pretrained.load_model(model, part, dtype="model", shardings=shardings, sizes=sizes)

    def batches(self, mesh: Mesh) -> Batches:
        """Random clips of `config.data.frames` frames, this host's rows of each batch."""
        self._sizes()
        data = self.config.data
        source = open_records(data, MAKE)
        for split, least in ((source, data.frames), (open_records(data, MAKE, "test"), 1)):
            for example in one_of_each(split):
                _check(example, least, data)
        return host_batches(source, _clips(data.frames, data.crop), data, mesh)

    def loss(
        self, model: AutoencoderKLWan, batch: dict[str, Any], keys: Key[Array, " b"]
    ) -> tuple[Float[Array, ""], Metrics]:
        """(loss, metrics) with PSNR in dB of the batch, and of its first frames."""
        weights, precision = self.config.reconstruction, self.config.precision
        video = to_float(batch["video"])
        mean, logvar = model.encode(video.astype(precision))
        mean, logvar = mean.astype(jnp.float32), logvar.astype(jnp.float32)
        noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys)
        latents = mean + jnp.exp(0.5 * logvar) * noise
        error = model.decode_unclipped(latents.astype(precision)).astype(jnp.float32) - video

        # Every chunk starts anew, so its first frame is seen as often as any other though it is rarer here.
        frame = jnp.ones(video.shape[1]).at[0].set(weights.first_frame)
        frame = (frame / frame.mean())[None, :, None, None, None]

        def penalty(x: jax.Array) -> jax.Array:
            # The absolute error alone is least where a small shape is left out; the squared one alone blurs detail.
            return jnp.mean(frame * (jnp.square(x) + weights.l1 * jnp.abs(x)))

        pixels = penalty(error)
        edges = penalty(jnp.diff(error, axis=2)) + penalty(jnp.diff(error, axis=3))
        kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar)
        total = pixels + weights.edge * edges + weights.kl * kl
        quality = psnr(error)
        metrics = {"pixels": pixels, "edges": edges, "kl": kl}
        metrics |= {"psnr": quality.mean(), "psnr_first": quality[:, 0].mean()}
        return total, metrics

    def export(self, model: AutoencoderKLWan, folder: Path) -> None:
        """Writes `folder`/vae with the latents' mean and deviation per channel over training chunks in its config.json.

        Beside it: `vae.json`, PSNR of whole chunks of the test split, and `vae.png`, four of them over their
        reconstructions.
        """
        model = gather(model)
        if jax.process_index():
            return
        encode, decode = jax.jit(lambda m, v: m.encode(to_float(v))[0]), jax.jit(lambda m, z: m.decode(z))
        data = self.config.data
        latents = np.concatenate([np.asarray(encode(model, v)) for v in first_chunks(data, "train", STATISTICS_CLIPS)])
        mean, std = latents.mean((0, 1, 2, 3)), latents.std((0, 1, 2, 3))
        statistics = {"latents_mean": tuple(mean.tolist()), "latents_std": tuple(std.tolist())}
        measured = dataclasses.replace(self._sizes(), **statistics)
        pretrained.save_model(model, measured, folder / "vae")

        videos, made = [], []
        for video in first_chunks(data, "test", TEST_CLIPS):
            videos.append(video)
            made.append(np.asarray(decode(model, encode(model, video))))
        video, made = np.concatenate(videos), np.concatenate(made)
        quality = np.asarray(psnr(made - to_float(video)))
        report = {
            "clips": len(video),
            "frames": video.shape[1],
            "psnr": float(quality.mean()),
            "psnr_first": float(quality[:, 0].mean()),
            "psnr_worst_clip": float(quality.mean(1).min()),
            **statistics,
        }
        (folder / "vae.json").write_text(json.dumps(report, indent=2) + "\n")
        _picture(video[:4], made[:4], folder / "vae.png")
        print(f"PSNR of {len(video)} test chunks: {report['psnr']:.2f} dB, first frames {report['psnr_first']:.2f} dB")
        print(f"exported {folder / 'vae'}", flush=True)

    def _sizes(self) -> VAEConfig:
        if self.config.model.vae is None:
            raise ConfigError("model.vae: the vae stage needs its sizes; as in configs/toy/base.yaml")
        return self.config.model.vae


def _start_plain(model: AutoencoderKLWan) -> None:
    """Starts residual branches at zero, and resampling as averaging and repetition: a blurred picture gets through.

    From random weights this narrow network stays at the mean colour for hundreds of steps.
    """
    for _, module in nnx.iter_modules(model):
        match module:
            case ResidualBlock():
                _set(module.conv2, 0.0)
            case AttentionBlock():
                _set(module.proj, 0.0)
            case Downsample():
                eye = jnp.eye(module.resample.weight.shape[-1])
                _set(module.resample, jnp.zeros((3, 3, 1, 1)).at[:2, :2].set(0.25) * eye)
                if module.time_conv is not None:
                    _set(module.time_conv, jnp.full((3, 1, 1, 1, 1), 1 / 3) * eye)
            case Upsample():
                weight = module.resample.weight[...]
                _set(module.resample, jnp.zeros((3, 3, 1, 1)).at[1, 1].set(3.0) * weight)
                if module.time_conv is not None:
                    eye = jnp.eye(weight.shape[-2])
                    _set(module.time_conv, jnp.zeros((3, 1, 1, 1, 1)).at[-1].set(1.0) * jnp.concatenate([eye, eye], 1))


def _set(conv: Conv, value: Any) -> None:
    conv.weight[...] = jnp.broadcast_to(jnp.asarray(value, jnp.float32), conv.weight.shape)


def to_float(video: Any) -> Any:
    """Pixels 0 to 255 as float32 in [-1, 1]."""
    return video.astype("float32") / 127.5 - 1.0


def psnr(error: Any) -> Float[Array, "b t"]:
    """Peak signal to noise ratio in dB of each frame, from differences of values in [-1, 1]."""
    return -10 * jnp.log10(jnp.mean(jnp.square(error), (2, 3, 4)) / 4 + 1e-10)


def _check(example: Example, least: int, data: ClipConfig) -> None:
    """Raises ConfigError for a video of fewer than `least` frames, or too small for the crop or for the VAE's steps."""
    sizes = (Axis(name, data.crop, "data.crop", or_more=True) for name in ("pixel rows", "pixel columns"))
    axes = (Axis("frames", least, "data.frames", or_more=True), *sizes, Axis("colours", 3))
    check_record(example, {"video": Field(axes, np.integer)}, data, MAKE)
    size = example["video"].shape[1:3]
    if data.crop is None and any(n % STEP for n in size):
        raise ConfigError(
            f"data.crop: {data.folder} has videos of {size[0]}x{size[1]} pixels, not multiples of {STEP} (the step of "
            f"the VAE in space); crop them, as in data.crop={max(STEP, min(size) // STEP * STEP)}"
        )


def _clips(frames: int, crop: int | None) -> Transform:
    """Random `frames` of a video, and a random square of `crop` pixels of them, as `video` alone."""
    clip = clip_transform(frames)

    def transform(example: Example, rng: np.random.Generator) -> Example:
        video = clip(example, rng)["video"]
        if crop is not None:
            y, x = (int(rng.integers(max(1, size - crop + 1))) for size in video.shape[1:3])
            video = np.ascontiguousarray(video[:, y : y + crop, x : x + crop])
        return {"video": video}

    return transform


def first_chunks(data: DataConfig, split: str, num: int, batch: int = 16) -> Iterator[np.ndarray]:
    """The first chunk of up to `num` videos of a split, uint8 [<= batch, CHUNK, h, w, 3] at a time."""
    source = open_source(data.folder, split, cache=data.cache)
    num = min(num, len(source))
    for start in range(0, num, batch):
        yield np.stack([source[i]["video"][:CHUNK] for i in range(start, min(num, start + batch))])


def _picture(video: np.ndarray, made: np.ndarray, path: Path) -> None:
    """Frames from left to right; clip, reconstruction, clip, ... from top to bottom."""
    columns = np.unique(np.linspace(0, video.shape[1] - 1, 9).astype(int))
    made = np.clip((made + 1) * 127.5 + 0.5, 0, 255).astype(np.uint8)
    rows = [np.concatenate(list(x[columns]), 1) for pair in zip(video, made) for x in pair]
    with replacing(path) as part:
        Image.fromarray(np.concatenate(rows, 0)).save(part, "png")
