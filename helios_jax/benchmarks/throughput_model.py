"""Pipelines of a given size with random weights, for the throughput benchmark."""

import math
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import helios_jax
from helios_jax.diffusion.schedule import DMDSchedulerConfig
from helios_jax.models.layers import Shapes
from helios_jax.models.ops.choices import DEVICE, Implementations
from helios_jax.models.tokenizer import Tokenizer
from helios_jax.models.transformer import Transformer, TransformerConfig
from helios_jax.models.umt5 import UMT5Config, UMT5Encoder
from helios_jax.models.vae import AutoencoderKLWan, VAEConfig
from helios_jax.pretrained.layout import dtype_of
from helios_jax.sampling.pipeline import HeliosPipeline
from helios_jax.sampling.plan import Variant

TOKENIZER = Path(helios_jax.__file__).parent / "assets" / "toy" / "tokenizer"
PROMPT = "a red square moves right fast on a black background"


@dataclass(frozen=True)
class Size:
    """A Distilled pipeline: its networks, the pixels of its videos, the chunks that a run makes."""

    transformer: TransformerConfig
    text_encoder: UMT5Config
    vae: VAEConfig
    height: int
    width: int
    chunks: int


SIZES = {
    "14b": Size(TransformerConfig(), UMT5Config(), VAEConfig(), 384, 640, chunks=8),
    # For two CPU cores. The VAE is a sixth as wide as the released one, and so near its share of a chunk's work.
    "small": Size(
        TransformerConfig(num_attention_heads=4, num_layers=8, ffn_dim=1408, text_dim=256),
        UMT5Config(vocab_size=256, d_model=256, d_ff=640, num_layers=6, num_heads=4),
        VAEConfig(base_dim=16),
        192,
        320,
        chunks=1,
    ),
    "tiny": Size(
        TransformerConfig(
            num_attention_heads=2, attention_head_dim=16, rope_dim=(4, 6, 6), num_layers=2, ffn_dim=48, text_dim=16
        ),
        UMT5Config(vocab_size=256, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4),
        VAEConfig(base_dim=4, dim_mult=(1, 1, 1, 1), num_res_blocks=1),
        64,
        64,
        chunks=1,
    ),
}


def make(size: Size, dtype: Any, *, stacked: bool, implementations: Implementations = DEVICE) -> HeliosPipeline:
    """The pipeline with weights drawn in `dtype`, at a scale that keeps activations near one."""

    abstract = Transformer.abstract(size.transformer, stacked=stacked, implementations=implementations)
    transformer = fill(abstract, dtype, 0)
    vae = fill(AutoencoderKLWan(size.vae, rngs=Shapes()), dtype, 1)
    text = fill(UMT5Encoder(size.text_encoder, rngs=Shapes()), dtype, 2)
    scheduler = DMDSchedulerConfig(use_dynamic_shifting=True)
    variant = Variant(pyramid=True, is_distilled=True, trained_size=(size.height, size.width))
    return HeliosPipeline(transformer, vae, text, Tokenizer.from_pretrained(TOKENIZER), scheduler, variant)


def fill(model: Any, dtype: Any, salt: int) -> Any:
    """A `model` of shapes with weights drawn in `dtype`, at a scale that keeps activations near one."""
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)
    filled = []
    for path, variable in nnx.to_flat_state(parameters):
        name = "/".join(map(str, path))
        shape, kind = variable.shape, dtype_of(model, path, dtype)
        vector = len(variable.axes) == 1
        fan = math.prod(shape[len(shape) - len(variable.axes) : -1])
        offset, scale = float(vector and not name.endswith("bias")), 0.1 if vector else fan**-0.5
        seed = salt, zlib.crc32(name.encode())
        filled.append((path, variable.replace(_draw(seed, shape, kind, offset, scale))))
    return nnx.merge(graph, nnx.from_flat_state(filled), rest)


def _draw(seed: tuple[int, int], shape: tuple[int, ...], dtype: Any, offset: float, scale: float) -> jax.Array:
    if jax.default_backend() == "cpu":  # compiling a draw for every shape would take minutes
        return jnp.asarray(offset + scale * np.random.default_rng(seed).standard_normal(shape, np.float32), dtype)
    key = jax.random.fold_in(jax.random.key(seed[0]), seed[1])
    return _draw_on_device(key, shape, dtype, offset, scale)


@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _draw_on_device(key: jax.Array, shape: tuple[int, ...], dtype: Any, offset: float, scale: float) -> jax.Array:
    return (offset + scale * jax.random.normal(key, shape, dtype)).astype(dtype)
