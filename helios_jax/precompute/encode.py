"""Pixels to latents and captions to embeddings, on all devices of this host."""

import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh
from jaxtyping import Float16, UInt8

from helios_jax import pretrained, sharding
from helios_jax.models import umt5
from helios_jax.models.layers import Shapes
from helios_jax.models.tokenizer import Tokenizer
from helios_jax.models.umt5 import UMT5Config, UMT5Encoder
from helios_jax.models.vae import AutoencoderKLWan, VAEConfig, normalize
from helios_jax.runtime.compilation import compute_dtype, precise
from helios_jax.runtime.seeds import check_seed
from helios_jax.sampling.options import MOST_TOKENS

# The negative prompt of the released models' training (upstream's data_config.negative_prompt).
NEGATIVE_PROMPT = (
    "Bright tones, overexposed, static, blurred details, subtitles, style, works, paintings, images, static, overall "
    "gray, worst quality, low quality, JPEG compression residue, ugly, incomplete, extra fingers, poorly drawn hands, "
    "poorly drawn faces, deformed, disfigured, misshapen limbs, fused fingers, still picture, messy background, three "
    "legs, many people in the background, walking backwards"
)
CAPTIONS = 8  # captions per device and call


def local_mesh(tensor: int = 1) -> Mesh:
    """This host's devices, grouped so that `tensor` devices hold one copy of the model; the copies share the work.

    Raises ValueError if the number of devices is not a multiple of `tensor`.
    """
    devices = jax.local_devices()
    if tensor < 1 or len(devices) % tensor:
        raise ValueError(f"{tensor} devices to a model: this host has {len(devices)}; give a divisor of it")
    shape = (len(devices) // tensor, 1, tensor, 1)
    return jax.make_mesh(shape, sharding.AXES, axis_types=(AxisType.Auto,) * 4, devices=devices)


class TextEmbedder:
    """The frozen text encoder; `text` is a diffusers folder with text_encoder/ and tokenizer/.

    The constructor reads only configs, so that errors are found before `load` reads weights.
    """

    def __init__(self, text: Path, max_length: int | None):
        self.folder = text
        self.config = pretrained.read_config(text / "text_encoder", UMT5Config)
        self.tokenizer = Tokenizer.from_pretrained(text / "tokenizer")
        self.max_length = self.tokenizer.max_length if max_length is None else max_length
        self.shape = (self.max_length, self.config.d_model)
        if not 1 <= self.max_length <= MOST_TOKENS:
            raise ValueError(f"--max-length is {max_length}: it must be from 1 to {MOST_TOKENS}")

    def load(self) -> "TextEmbedder":
        """Reads the weights: float32 on CPU and bfloat16 elsewhere, as in the pipeline."""
        self._mesh = local_mesh()
        abstract = UMT5Encoder(self.config, rngs=Shapes())
        dtype = compute_dtype()
        placed = sharding.shardings(abstract, self._mesh)
        self._model = pretrained.load_model(abstract, self.folder / "text_encoder", dtype=dtype, shardings=placed)
        return self

    def __call__(self, captions: Iterable[str]) -> Iterator[Float16[np.ndarray, "m d"]]:
        """Yields the embedding of each caption, float16 [max_length, d_model], zero past the caption's end."""
        size = _multiple(CAPTIONS, self._mesh)
        for group in _groups(captions, size):
            ids, mask = self.tokenizer(group + [""] * (size - len(group)), self.max_length)
            rows = _embed(self._model, *sharding.put_batch((ids, mask), size, self._mesh))
            yield from np.asarray(rows)[: len(group)]


class VideoEncoder:
    """The frozen VAE, from its diffusers folder. Each device encodes `batch` chunks at a time.

    Latents are normalized. They are the posterior's mean or, with `sample`, drawn from it with noise that follows from
    `seed` and the video's id (upstream draws them).
    """

    def __init__(self, vae: Path, *, batch: int = 1, sample: bool = False, seed: int = 0):
        if batch < 1:
            raise ValueError(f"--batch is {batch}: it must be at least 1")
        self.folder, self.batch, self.sample, self.seed = vae, batch, sample, check_seed(seed, "--seed")
        self.config = pretrained.read_config(vae, VAEConfig)

    def load(self) -> "VideoEncoder":
        """Reads the weights, in float32."""
        self._mesh = local_mesh()
        abstract = AutoencoderKLWan(self.config, rngs=Shapes())
        placed = sharding.shardings(abstract, self._mesh)
        self._model = pretrained.load_model(abstract, self.folder, dtype=jnp.float32, shardings=placed)
        return self

    def frames(self, chunk_frames: int) -> int:
        """Latent frames of a chunk. Raises ValueError for a number of frames that the VAE cannot encode."""
        step = self.config.scale_factor_temporal
        if chunk_frames < 1 or chunk_frames % step != 1 % step:
            raise ValueError(f"a chunk of {chunk_frames} frames: the VAE takes 1 + {step}k, such as {8 * step + 1}")
        return (chunk_frames - 1) // step + 1

    def __call__(
        self, videos: Iterable[tuple[str, UInt8[np.ndarray, "k f h w 3"]]]
    ) -> Iterator[Float16[np.ndarray, "k t h w c"]]:
        """Yields the latents of each (id, video). Each chunk is encoded alone; a batch can hold several videos."""
        size = _multiple(self.batch, self._mesh)
        waiting: deque[int] = deque()  # chunks of videos that are not complete
        done: deque[np.ndarray] = deque()

        def chunks() -> Iterator[tuple[str, int, np.ndarray]]:
            for name, video in videos:
                waiting.append(len(video))
                for number, chunk in enumerate(video):
                    yield name, number, chunk

        for group in _groups(chunks(), size):
            full = [*group, *[group[-1]] * (size - len(group))]
            pixels = np.stack([chunk for _, _, chunk in full])
            noise = np.stack([self._noise(*each) for each in full]) if self.sample else None
            with precise(jnp.float32):
                rows = _encode(self._model, *sharding.put_batch((pixels, noise), size, self._mesh))
            done.extend(np.asarray(rows)[: len(group)])
            while waiting and len(done) >= waiting[0]:
                yield np.stack([done.popleft() for _ in range(waiting.popleft())])

    def _noise(self, name: str, number: int, chunk: np.ndarray) -> np.ndarray:
        frames, height, width, _ = chunk.shape
        space = self.config.scale_factor_spatial
        shape = (self.frames(frames), height // space, width // space, self.config.z_dim)
        return np.random.default_rng([self.seed, zlib.crc32(name.encode()), number]).standard_normal(shape, np.float32)


# The programs belong to the module, not to an object, so that two encoders of one process compile once.
@jax.jit
def _embed(model: UMT5Encoder, ids: Any, mask: Any) -> Any:
    return umt5.encode(model, ids, mask).astype(jnp.float16)


@jax.jit
def _encode(model: AutoencoderKLWan, pixels: Any, noise: Any) -> Any:
    mean, logvar = model.encode(pixels.astype(jnp.float32) / 127.5 - 1.0)
    latents = mean if noise is None else mean + jnp.exp(0.5 * logvar) * noise
    return normalize(latents, model.config).astype(jnp.float16)


def _multiple(size: int, mesh: Mesh) -> int:
    """Rows of a batch with `size` rows for each copy of the model on the mesh."""
    return size * mesh.shape["data"]


def _groups(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    group: list[Any] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
