"""Latents to frames."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from helios_jax.models.vae import AutoencoderKLWan, denormalize, normalize
from helios_jax.runtime.program import program
from helios_jax.sampling.plan import Plan


@program(static_argnames="dtype")
def decode(vae: AutoencoderKLWan, latents: Float[Array, "b t h w c"], *, dtype: str) -> Array:
    """One chunk's pixels: float32 in [0, 1], or uint8."""
    x = denormalize(latents, vae.config).astype(vae.post_quant_conv.weight.dtype)
    with jax.named_scope("vae"):
        pixels = jnp.clip(vae.decode(x).astype(jnp.float32) / 2 + 0.5, 0, 1)
    return jnp.round(pixels * 255).astype(jnp.uint8) if dtype == "uint8" else pixels


def last_frame(vae: AutoencoderKLWan, latents: Float[Array, "b t h w c"]) -> Float[Array, "b 1 h w c"]:
    """The last pixel frame of a chunk, as the latent frame of an image: as the first frame of the next chunk."""
    dtype = vae.quant_conv.weight.dtype
    pixels = vae.decode(denormalize(latents, vae.config).astype(dtype))[:, -1:]
    mean, _ = vae.encode(jnp.clip(pixels, -1, 1))
    return normalize(mean.astype(jnp.float32), vae.config)


def decode_video(vae: AutoencoderKLWan, latents: Float[Array, "b t h w c"], plan: Plan, *, dtype: str) -> np.ndarray:
    """The pixels of a whole video, chunk by chunk: the first latent frame of each is an image's."""
    chunks = jnp.split(latents, latents.shape[1] // plan.memory.frames_per_chunk, axis=1)
    made = (np.asarray(decode(vae, chunk, dtype=dtype)) for chunk in chunks)
    added = [chunk[:, -plan.frames.of(number) :] for number, chunk in enumerate(made)]
    return np.concatenate(added, 1)[:, : plan.options.num_frames]
