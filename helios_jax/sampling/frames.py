"""Decodes latents to pixels, and encodes single frames to latents."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from helios_jax.models.vae import AutoencoderKLWan, denormalize, normalize
from helios_jax.runtime.program import program
from helios_jax.sampling.plan import Plan


def to_pixels(vae: AutoencoderKLWan, latents: Float[Array, "b t h w c"], *, dtype: str) -> Array:
    """One chunk's pixels: float32 in [0, 1], or uint8."""
    x = denormalize(latents, vae.config).astype(vae.post_quant_conv.weight.dtype)
    with jax.named_scope("vae"):
        pixels = jnp.clip(vae.decode(x).astype(jnp.float32) / 2 + 0.5, 0, 1)
    return jnp.round(pixels * 255).astype(jnp.uint8) if dtype == "uint8" else pixels


decode = program(static_argnames="dtype")(to_pixels)


def last_frame(vae: AutoencoderKLWan, pixels: UInt8[Array, "b t h w 3"]) -> Float[Array, "b 1 h_ w_ c"]:
    """Encodes the last frame of a chunk, as an image, to the first latent frame of the next chunk."""
    return to_latent(vae, pixels[:, -1:].astype(jnp.float32) / 127.5 - 1)


def to_latent(vae: AutoencoderKLWan, image: Float[Array, "b 1 h w 3"]) -> Float[Array, "b 1 h_ w_ c"]:
    """The normalized latent frame of images in [-1, 1]: the mean, without a random draw."""
    mean, _ = vae.encode(image.astype(vae.quant_conv.weight.dtype))
    return normalize(mean.astype(jnp.float32), vae.config)


encode_last_frame, encode_image = program()(last_frame), program()(to_latent)


def decode_video(vae: AutoencoderKLWan, latents: Float[Array, "b t h w c"], plan: Plan, *, dtype: str) -> np.ndarray:
    """The pixels [b, t, h, w, 3] of a whole video of `num_frames` frames, in the `dtype` of `to_pixels`.

    Each chunk is decoded on its own, because its first latent frame stands for one frame, as an image's does.
    """
    chunks = jnp.split(latents, latents.shape[1] // plan.memory.frames_per_chunk, axis=1)
    made = (np.asarray(decode(vae, chunk, dtype=dtype)) for chunk in chunks)
    added = [chunk[:, -plan.frames.of(number) :] for number, chunk in enumerate(made)]
    return np.concatenate(added, 1)[:, : plan.options.num_frames]
