"""An image or a video as the history of the first chunk (image to video, video to video).

The host part (`read_context`) reads, checks and resizes, and needs no weights. The device part (`encode_context`)
encodes and adds noise; it draws random numbers in the order of diffusers' Helios pipelines.
"""

import dataclasses
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard, TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from PIL import Image

from helios_jax.diffusion.memory import History, MemoryConfig, empty
from helios_jax.diffusion.noising import add_noise
from helios_jax.media.image import read_image, resize, to_rgb
from helios_jax.media.video import iterate_video
from helios_jax.models.vae import AutoencoderKLWan, VAEConfig, normalize
from helios_jax.runtime.program import program
from helios_jax.sampling.download import local
from helios_jax.sampling.frames import encode_image
from helios_jax.sampling.noise import Noise, draw
from helios_jax.sampling.options import ContextConfig
from helios_jax.sampling.plan import Plan

ImageInput = Image.Image | np.ndarray | str | os.PathLike
Posterior = Sequence[Array]  # mean and standard deviation [n, t, h, w, c]
Drawn = TypeVar("Drawn")
VideoInput = Sequence[Image.Image | np.ndarray] | np.ndarray | str | os.PathLike


def prepare_images(
    image: ImageInput | Sequence[ImageInput], batch: int, height: int, width: int
) -> Float[np.ndarray, "n 1 h w 3"]:
    """Images at the given size, in [-1, 1]: one for the whole batch (n is 1) or one for each prompt (n is `batch`).

    `image` is one image, or a sequence or an array [n, h, w, 3] of several. Raises the errors of `preprocess`, and
    ValueError for another number of images.
    """
    many = _is_list(image) or (isinstance(image, np.ndarray) and image.ndim == 4)
    images: Any = image if many else [image]
    _check_count("image", len(images), batch)
    return np.stack([preprocess([x], height, width, f"image {i}" if many else "image") for i, x in enumerate(images)])


@dataclass(frozen=True)
class Still:
    """Input images: `pixels` [n, 1, h, w, 3] in [-1, 1]."""

    pixels: np.ndarray

    def repeated(self, copies: int) -> "Still":
        """Each image `copies` times in a row; a single image stays one, for the whole batch."""
        return self if len(self.pixels) == 1 else Still(np.repeat(self.pixels, copies, 0))


@dataclass(frozen=True)
class Clip:
    """The parts of n input videos that the history needs, in [-1, 1]: the first frame [n, 1, h, w, 3] and the last
    chunks (`tail`) [n, t, h, w, 3]. `num_chunks` counts the whole chunks of each video."""

    first: np.ndarray
    tail: np.ndarray
    num_chunks: int

    def repeated(self, copies: int) -> "Clip":
        """Each video `copies` times in a row; a single video stays one, for the whole batch."""
        if len(self.first) == 1:
            return self
        return Clip(np.repeat(self.first, copies, 0), np.repeat(self.tail, copies, 0), self.num_chunks)


# The pixels that a video begins with or continues; None for text to video.
Context = Still | Clip | None


def read_context(image: Any, video: Any, prompts: int, plan: Plan, vae: VAEConfig) -> Context:
    """The pixels of `image` or of `video`, one for all prompts or one for each, read once and brought to size.

    Raises ValueError or FileNotFoundError, in one line, for inputs that cannot be used.
    """
    if image is not None and video is not None:
        raise ValueError("image and video were both given: a video begins with the one or continues the other")
    size = plan.options.height, plan.options.width
    if image is not None:
        return Still(prepare_images(image, prompts, *size))
    if video is not None:
        return prepare_videos(video, prompts, *size, plan.memory, vae, plan.options.video_fps)
    return None


def encode_context(vae: AutoencoderKLWan, context: Context, plan: Plan, noise: Noise, batch: int) -> History:
    """The history that the first chunk of `batch` videos follows."""
    if isinstance(context, Still):
        return from_image(vae, context.pixels, plan.memory, plan.options, noise, batch)
    if isinstance(context, Clip):
        return from_video(vae, context, plan.memory, plan.options, noise, batch)
    return empty(plan.memory, batch, *plan.latent_shape[1:])


def encode_border(vae: AutoencoderKLWan, context: Still | Clip, batch: int) -> Float[Array, "b 1 h w c"]:
    """The image, or the video's last frame, as a latent frame: the first chunk begins with it where chunks overlap."""
    frame = context.pixels if isinstance(context, Still) else context.tail[:, -1:]
    latent = encode_image(vae, jnp.asarray(frame))
    return jnp.broadcast_to(latent, (batch, *latent.shape[1:]))


def prepare_videos(
    video: VideoInput | Sequence[VideoInput],
    batch: int,
    height: int,
    width: int,
    memory: MemoryConfig,
    vae: VAEConfig,
    fps: float | None = None,
) -> Clip:
    """The clip of one video for the whole batch (n is 1), or of one for each prompt (n is `batch`).

    `video` is one video, or a sequence or an array [n, t, h, w, 3] of several. A list of images is one video, a list of
    files is several. Only the frames that the history needs are held and resized, however long a file is. `fps` is that
    of `frames_of`.

    Raises ValueError or FileNotFoundError, in one line, for files that cannot be read, for less than a chunk of frames,
    and for videos of different lengths.
    """
    many = (_is_list(video) and len(video) > 0 and not _is_frame(video[0])) or (
        isinstance(video, np.ndarray) and video.ndim == 5
    )
    videos: Any = video if many else [video]
    _check_count("video", len(videos), batch)
    frames = _chunk_frames(memory, vae)
    keep = frames * -(-memory.frames // memory.frames_per_chunk)
    firsts, tails, counts = [], [], []
    for i, one in enumerate(videos):
        name = str(one) if _is_path(one) else f"video {i}" if many else "video"
        first, last, count = _ends(frames_of(one, fps, name), keep)
        if count < frames:
            rate = "" if fps is None else f" at {fps:g} frames a second"
            raise ValueError(f"{name}: {count} frames{rate}, fewer than the {frames} of a chunk; give a longer video")
        last = last[len(last) % frames :]  # whole chunks, counted from the end
        firsts.append(preprocess([first], height, width, f"the first frame of {name}"))
        tails.append(preprocess(last, height, width, f"a frame of {name}"))
        counts.append(count)
    if len(set(counts)) > 1:
        raise ValueError(f"videos of one batch must be equally long, got {counts} frames; cut them, or make them apart")
    return Clip(np.stack(firsts), np.stack(tails), counts[0] // frames)


def from_image(
    vae: AutoencoderKLWan,
    pixels: Float[np.ndarray, "n 1 h w 3"],
    memory: MemoryConfig,
    config: ContextConfig,
    noise: Noise,
    batch: int | None = None,
) -> History:
    """The history of an image: the anchor is the image, the newest frame the last latent of a chunk that repeats it.

    All other frames are zeros. `pixels` come from `prepare_images`. One image serves `batch` videos, each with random
    draws of its own.
    """
    posterior = _encode_still(vae, pixels, memory)
    shape = (batch or len(pixels), *posterior[0].shape[1:])
    one = (shape[0], 1, *shape[2:])
    anchor = _sample(vae, [x[:, :1] for x in posterior], _normal(noise, "image_posterior", one))
    recent = _sample(vae, posterior, _normal(noise, "fake_image_posterior", shape))[:, -1:]
    if config.add_noise_to_image_latents:
        anchor = add_noise(anchor, *_draw_noise(noise, "image", one, *config.image_sigmas))
        recent = add_noise(recent, *_draw_noise(noise, "fake_image", one, *config.video_sigmas))
    return _history(memory, anchor, recent)


def from_video(
    vae: AutoencoderKLWan,
    clip: Clip,
    memory: MemoryConfig,
    config: ContextConfig,
    noise: Noise,
    batch: int | None = None,
) -> History:
    """The history of a video: its first frame is the anchor, its last latents fill the window, after zeros if too few.

    The video is cut into chunks from its end; frames left at its beginning are dropped. `clip` comes from
    `prepare_videos`. One video serves `batch` videos, each with random draws of its own.
    """
    posterior = _encode_still(vae, clip.first, memory)
    shape = (batch or len(clip.first), *posterior[0].shape[1:])
    one = (shape[0], 1, *shape[2:])
    anchor = _sample(vae, [x[:, :1] for x in posterior], _normal(noise, "first_frame_posterior", one))
    parts = np.split(clip.tail, clip.tail.shape[1] // _chunk_frames(memory, vae.config), axis=1)

    def last(draws: Iterable[Drawn]) -> Iterable[Drawn]:
        """Keeps the draws of the chunks that are encoded; as in diffusers, earlier chunks consume draws, too."""
        return deque(draws, maxlen=len(parts))

    draws = last(_normal(noise, "video_posterior", shape) for _ in range(clip.num_chunks))
    chunks = [_sample(vae, _posterior(vae, jnp.asarray(part)), z) for part, z in zip(parts, draws)]
    if config.add_noise_to_video_latents:
        anchor = add_noise(anchor, *_draw_noise(noise, "first_frame", one, *config.image_sigmas))
        draws = last(_draw_noise(noise, "video", shape, *config.video_sigmas) for _ in range(clip.num_chunks))
        chunks = [add_noise(chunk, *drawn) for chunk, drawn in zip(chunks, draws)]
    history = _history(memory, anchor, jnp.concatenate(chunks, 1))
    return dataclasses.replace(history, before=jnp.asarray(clip.num_chunks, jnp.int32))


@program()
def _posterior(vae: AutoencoderKLWan, pixels: Float[Array, "n t h w 3"]) -> Posterior:
    """Mean and standard deviation of a chunk's latents, float32: one program for images and videos."""
    mean, logvar = vae.encode(pixels.astype(vae.quant_conv.weight.dtype))
    return mean.astype(jnp.float32), jnp.exp(0.5 * logvar.astype(jnp.float32))


def _encode_still(vae: AutoencoderKLWan, pixels: Float[np.ndarray, "n 1 h w 3"], memory: MemoryConfig) -> Posterior:
    """Encodes a chunk that repeats one frame. The VAE is causal: the first latent depends on the first frame alone."""
    return _posterior(vae, jnp.repeat(jnp.asarray(pixels), _chunk_frames(memory, vae.config), 1))


def _sample(vae: AutoencoderKLWan, posterior: Posterior, z: Array) -> Array:
    mean, std = posterior
    return normalize(mean + std * z, vae.config)


def _normal(noise: Noise, site: str, shape: tuple[int, ...]) -> Array:
    return jnp.asarray(draw(noise.normal(site, shape), shape, site))


def _draw_noise(noise: Noise, site: str, shape: tuple[int, ...], low: float, high: float) -> tuple[Array, Array]:
    """Draws noise of `shape`, and sigmas [1, t] between `low` and `high`, one per frame and shared by the batch."""
    name, frames = f"{site}_sigma", (shape[1],)
    sigma = low + (high - low) * jnp.asarray(draw(noise.uniform(name, frames), frames, name))
    return _normal(noise, f"{site}_noise", shape), sigma[None]


def _history(memory: MemoryConfig, anchor: Array, latents: Array) -> History:
    """A history whose newest frames are `latents` (the last ones that fit), after zeros."""
    batch, _, *size = latents.shape
    blank = empty(memory, batch, *size)
    latents = jnp.concatenate([blank.latents, latents], 1)[:, -memory.frames :]
    return dataclasses.replace(blank, latents=latents, anchor=anchor, anchored=jnp.asarray(True))


def _chunk_frames(memory: MemoryConfig, vae: VAEConfig) -> int:
    return (memory.frames_per_chunk - 1) * vae.scale_factor_temporal + 1


def _is_path(x: Any) -> bool:
    return isinstance(x, str | os.PathLike)


def _is_list(x: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(x, Sequence) and not isinstance(x, str)


def _is_frame(x: Any) -> bool:
    return isinstance(x, Image.Image) or (isinstance(x, np.ndarray) and x.ndim == 3)


def _check_count(what: str, count: int, batch: int) -> None:
    if count not in (1, batch):
        raise ValueError(f"{count} {what}s for {batch} prompts: give one {what} for all, or as many as prompts")


def frames_of(video: Any, fps: float | None, name: str) -> Iterable[Any]:
    """The frames of one video: a file or its http address, a sequence of images or arrays, or an array [t, h, w, 3].

    The frames of a file are read lazily, at `fps` frames a second (None: all of its frames). Raises ValueError for
    other values, and for `fps` with frames in memory.
    """
    if _is_path(video):
        return _frames_of_file(video, fps)
    if fps is not None:
        raise ValueError(f"{name}: fps is for files, frames in memory have no rate to convert from; leave fps out")
    if not (_is_list(video) or (isinstance(video, np.ndarray) and video.ndim == 4)) or len(video) == 0:
        raise ValueError(f"{name}: must be a file, a list of images or an array [t, h, w, 3], got {_describe(video)}")
    return video


def _frames_of_file(video: str | os.PathLike, fps: float | None) -> Iterator[np.ndarray]:
    with local(video, "video") as path:
        yield from iterate_video(path, fps)


def _ends(frames: Iterable[Any], keep: int) -> tuple[Any, list[Any], int]:
    """The first frame, the last `keep` frames, and how many there are."""
    first, last, count = None, deque(maxlen=keep), 0
    for frame in frames:
        first = frame if count == 0 else first
        last.append(frame)
        count += 1
    return first, list(last), count


def preprocess(frames: Iterable[Any], height: int, width: int, name: str) -> np.ndarray:
    """Frames as the VAE takes them: float32 [t, h, w, 3] in [-1, 1] of the size asked for, proportions not kept.

    A frame is a file or its http address (upright by its EXIF data), a PIL image (as it is), or an array [h, w, 3],
    uint8 or floats in [0, 1]. Every kind is resized by Lanczos. For PIL images the result is diffusers'
    `VideoProcessor`'s, bit for bit. For arrays we differ: it takes the nearest pixels, which aliases, and does not
    scale uint8.

    Raises ValueError or FileNotFoundError, in one line that begins with `name`, for anything else.
    """
    return np.stack([2 * resize(_rgb(frame, name), height, width) - 1 for frame in frames])


def _rgb(image: Any, name: str) -> np.ndarray:
    """An array [h, w, 3], uint8 or floats in [0, 1]."""
    if _is_path(image):
        with local(image, "image") as path:
            return read_image(path)
    if isinstance(image, Image.Image):
        return np.asarray(to_rgb(image, name))
    known = isinstance(image, np.ndarray) and (image.dtype == np.uint8 or np.issubdtype(image.dtype, np.floating))
    if not (known and image.ndim == 3 and image.shape[2] == 3 and image.size):
        raise ValueError(f"{name}: must be an image or an array [h, w, 3], uint8 or float, got {_describe(image)}")
    if image.dtype != np.uint8 and not (image.min() >= 0 and image.max() <= 1):
        raise ValueError(f"{name}: floats must be from 0 to 1, got {image.min():g} to {image.max():g}; scale them")
    return image


def _describe(x: Any) -> str:
    if isinstance(x, np.ndarray):
        return f"{x.dtype} {list(x.shape)}"
    return f"{type(x).__name__} of {len(x)}" if _is_list(x) else type(x).__name__
