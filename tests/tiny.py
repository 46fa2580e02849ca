"""A pipeline of the released classes, tiny and with random weights, as a diffusers folder."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

import helios_jax
from helios_jax.diffusion.memory import MemoryConfig
from helios_jax.diffusion.schedule import SchedulerConfig
from helios_jax.models.layers import Shapes
from helios_jax.models.tokenizer import Tokenizer
from helios_jax.models.transformer import Transformer, TransformerConfig
from helios_jax.models.umt5 import UMT5Config, UMT5Encoder
from helios_jax.models.vae import AutoencoderKLWan, VAEConfig
from helios_jax.pretrained import file_entries, from_arrays
from helios_jax.sampling.pipeline import HeliosPipeline
from helios_jax.sampling.plan import Variant
from helios_jax.trained import Trained

TOKENIZER = Path(helios_jax.__file__).parent / "assets" / "toy" / "tokenizer"
TRANSFORMER = TransformerConfig(
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=4,
    out_channels=4,
    text_dim=16,
    freq_dim=32,
    ffn_dim=48,
    num_layers=2,
    rope_dim=(4, 6, 6),
)
VAE = VAEConfig(
    base_dim=3, z_dim=4, dim_mult=(1, 1, 1, 1), num_res_blocks=1, latents_mean=(0,) * 4, latents_std=(1,) * 4
)


def draw(model: nnx.Module, rng: np.random.Generator) -> nnx.Module:
    """An abstract model with random values everywhere, at a scale that keeps activations near one.

    Drawn by numpy: compiling one random draw per shape takes longer than most tests.
    """
    values = {}
    for key, entry in file_entries(model).items():
        noise = rng.standard_normal(entry.shape, np.float32)
        vector = len(entry.shape) < 2 or key.endswith("gamma")
        offset = 0 if key.endswith("bias") else 1
        values[key] = offset + 0.1 * noise if vector else noise / np.sqrt(max(1, np.prod(entry.shape[1:])))
    return from_arrays(model, values)


def pipeline(seed: int = 0) -> HeliosPipeline:
    """The pipeline with weights drawn from a seed."""
    tokenizer = Tokenizer.from_pretrained(TOKENIZER)
    text = UMT5Config(vocab_size=tokenizer.vocab_size, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4)
    rng = np.random.default_rng(seed)
    return HeliosPipeline(
        draw(Transformer.abstract(TRANSFORMER), rng),
        draw(AutoencoderKLWan(VAE, rngs=Shapes()), rng),
        draw(UMT5Encoder(text, rngs=Shapes()), rng),
        tokenizer,
        SchedulerConfig(stages=1, stage_range=(0.0, 1.0), use_dynamic_shifting=True),
        Variant(trained_size=(32, 48)),
    )


def folder(path: Path, dtype=jnp.float32) -> Path:
    """The pipeline saved in `path`, as trained for chunks of three latent frames."""
    pipe = pipeline()
    pipe.variant = dataclasses.replace(pipe.variant, trained=Trained(MemoryConfig(frames_per_chunk=3)))
    pipe.save_pretrained(path, dtype=dtype)
    return path
