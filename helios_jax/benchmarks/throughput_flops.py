"""Floating point operations of the sampler's parts, counted from their shapes: two for each multiply and add."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from helios_jax.models.transformer import TransformerConfig
from helios_jax.models.umt5 import UMT5Config


def transformer_pass(config: TransformerConfig, noisy: int, history: int, text: int) -> int:
    """One pass over `noisy` and `history` tokens, without computing the text's keys and values."""
    d, tokens = config.dim, noisy + history

    def block(kept: int) -> int:
        """A block that returns `kept` tokens."""
        project = 4 * tokens * d * d + 4 * kept * d * d  # key and value of all; query and output
        attend = 4 * kept * tokens * d
        cross = 4 * noisy * d * d + 4 * noisy * text * d
        return project + attend + cross + 4 * kept * d * config.ffn_dim

    patch = math.prod(config.patch_size)
    ends = 2 * tokens * patch * config.in_channels * d + 2 * noisy * d * patch * config.out_channels
    return (config.num_layers - 1) * block(tokens) + block(noisy) + ends


def text_encoder(config: UMT5Config, tokens: int) -> int:
    """One prompt of `tokens` positions."""
    inner = config.num_heads * config.d_kv
    layer = (
        8 * tokens * config.d_model * inner + 4 * tokens * tokens * inner + 6 * tokens * config.d_model * config.d_ff
    )
    return config.num_layers * layer


def text_kv(config: TransformerConfig, text: int) -> int:
    """The keys and values of one prompt in every block, and the projection of its embedding."""
    return 4 * text * config.dim**2 * config.num_layers + 2 * text * config.dim * (config.text_dim + config.dim)


def matmul_rate(size: int, dtype: Any, seconds: Callable[[Callable[[], Any]], float]) -> float:
    """Operations a second of square products of `size`, timed by `seconds`; it gives the floor of each part's time."""
    a, b = (jnp.asarray(np.random.default_rng(i).standard_normal((size, size), np.float32), dtype) for i in (0, 1))
    multiply = jax.jit(jnp.matmul)
    return 2 * size**3 / seconds(lambda: multiply(a, b))
