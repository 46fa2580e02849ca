"""LoRA arrays for three modules of the tiny transformer."""

import numpy as np

from helios_jax import lora
from helios_jax.models.transformer import Transformer
from helios_jax.pretrained import from_arrays, to_arrays
from tests import tiny

Q, FFN, PATCH = "blocks.0.attn1.to_q", "blocks.1.ffn.net.2", "patch_mid"
A, B = f"transformer.{Q}.lora_A.weight", f"transformer.{Q}.lora_B.weight"


def model(stacked=False, dtype=None, seed=0):
    arrays = to_arrays(tiny.draw(Transformer.abstract(tiny.TRANSFORMER), np.random.default_rng(seed)))
    return from_arrays(Transformer.abstract(tiny.TRANSFORMER, stacked=stacked), arrays, dtype=dtype)


def pair(name, rank=4, seed=1, out=None):
    """A file's keys for one module of the tiny model."""
    out, *inner = lora.adapters.targets(Transformer.abstract(tiny.TRANSFORMER))[name].shape
    rng = np.random.default_rng(seed)
    ones = [1] * (len(inner) - 1)
    return {
        f"transformer.{name}.lora_A.weight": rng.standard_normal((rank, *inner)).astype(np.float32),
        f"transformer.{name}.lora_B.weight": rng.standard_normal((out, rank, *ones)).astype(np.float32),
    }


ARRAYS = {**pair(Q), **pair(FFN, rank=2), **pair(PATCH, rank=3)}
