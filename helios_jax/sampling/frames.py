"""Latents to frames."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from helios_jax.models.vae import AutoencoderKLWan, denormalize
from helios_jax.runtime.program import program


@program(static_argnames="dtype")
def decode(vae: AutoencoderKLWan, latents: Float[Array, "b t h w c"], *, dtype: str) -> Array:
    """One chunk's pixels: float32 in [0, 1], or uint8."""
    x = denormalize(latents, vae.config).astype(vae.post_quant_conv.weight.dtype)
    with jax.named_scope("vae"):
        pixels = jnp.clip(vae.decode(x).astype(jnp.float32) / 2 + 0.5, 0, 1)
    return jnp.round(pixels * 255).astype(jnp.uint8) if dtype == "uint8" else pixels


def decode_video(
    vae: AutoencoderKLWan, latents: Float[Array, "b t h w c"], frames_per_chunk: int, *, dtype: str
) -> np.ndarray:
    """The pixels of a whole video, chunk by chunk: the first latent frame of each is an image's."""
    chunks = jnp.split(latents, latents.shape[1] // frames_per_chunk, axis=1)
    return np.concatenate([np.asarray(decode(vae, chunk, dtype=dtype)) for chunk in chunks], 1)
