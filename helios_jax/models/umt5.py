"""The UMT5 encoder: token ids of a prompt to the embeddings that condition the transformer."""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from helios_jax.models.layers import Embedding, Linear, RMSNorm, normal

Mask = Bool[Array, "b m"] | Int[Array, "b m"]


@dataclass(unsafe_hash=True)
class UMT5Config:
    """The architecture, in the names of transformers' `UMT5Config`; the defaults are UMT5-XXL, which Helios uses."""

    CLASS_NAME: ClassVar[str] = "UMT5EncoderModel"
    MODEL_TYPE: ClassVar[str] = "umt5"
    WEIGHTS_NAME: ClassVar[str] = "model.safetensors"

    vocab_size: int = 256384
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "gated-gelu"

    def __post_init__(self) -> None:
        if self.feed_forward_proj != "gated-gelu":
            raise ValueError(f"feed_forward_proj is {self.feed_forward_proj!r}: UMT5 encoders have 'gated-gelu' only")
        quarter = self.relative_attention_num_buckets // 4
        if self.relative_attention_num_buckets % 4 or not 0 < quarter < self.relative_attention_max_distance:
            raise ValueError(
                f"relative_attention_num_buckets is {self.relative_attention_num_buckets}: it must be a multiple of 4,"
                f" and a quarter of it less than relative_attention_max_distance"
                f" ({self.relative_attention_max_distance})"
            )


def relative_buckets(length: int, config: UMT5Config) -> np.ndarray:
    """Row of the bias table for each query (row) and key (column) of `length` tokens, int32.

    Half of the table is for keys after the query. In each half, half of the rows stand for single distances; the others
    grow logarithmically up to the maximal distance. Computed on the host in float32, as in transformers: elsewhere the
    logarithms of some distances round to the other side of a boundary.
    """
    half = config.relative_attention_num_buckets // 2
    exact = half // 2
    distance = np.arange(length)[None] - np.arange(length)[:, None]
    far = np.log(np.maximum(np.abs(distance), 1).astype(np.float32) / np.float32(exact))
    far = far / np.float32(math.log(config.relative_attention_max_distance / exact)) * np.float32(half - exact)
    bucket = np.where(np.abs(distance) < exact, np.abs(distance), np.minimum(exact + far.astype(np.int32), half - 1))
    return (bucket + half * (distance > 0)).astype(np.int32)


class Attention(nnx.Module):
    """Self-attention with a learned bias per relative position and head."""

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs):
        self.config = config
        d, inner = config.d_model, config.num_heads * config.d_kv
        # Scores are not scaled: the factor d_kv^-0.5 is in the initial weights of the queries instead.
        query_init = normal((d * config.d_kv) ** -0.5)
        self.q = Linear(d, inner, axes=("embed", "heads"), bias=False, init=query_init, rngs=rngs)
        self.k = Linear(d, inner, axes=("embed", "heads"), bias=False, rngs=rngs)
        self.v = Linear(d, inner, axes=("embed", "heads"), bias=False, rngs=rngs)
        self.o = Linear(inner, d, axes=("heads", "embed"), bias=False, rngs=rngs)
        table = (config.relative_attention_num_buckets, config.num_heads)
        self.relative_attention_bias = Embedding(*table, axes=(None, "heads"), init=normal(d**-0.5), rngs=rngs)

    def __call__(self, x: Float[Array, "b m d"], mask: Bool[Array, "b m"]) -> Float[Array, "b m d"]:
        b, m, _ = x.shape
        q, k, v = (f(x).reshape(b, m, self.config.num_heads, self.config.d_kv) for f in (self.q, self.k, self.v))
        bias = self.relative_attention_bias(jnp.asarray(relative_buckets(m, self.config)))
        bias = bias.transpose(2, 0, 1)[None].astype(x.dtype)
        y = jax.nn.dot_product_attention(q, k, v, bias, mask[:, None, None], scale=1.0, implementation="xla")
        return self.o(y.reshape(b, m, -1))


class GatedMLP(nnx.Module):
    """gelu(x wi_0) * (x wi_1) wo, with the tanh form of the GELU."""

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs):
        self.wi_0 = Linear(config.d_model, config.d_ff, axes=("embed", "mlp"), bias=False, rngs=rngs)
        self.wi_1 = Linear(config.d_model, config.d_ff, axes=("embed", "mlp"), bias=False, rngs=rngs)
        self.wo = Linear(config.d_ff, config.d_model, axes=("mlp", "embed"), bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "b m d"]) -> Float[Array, "b m d"]:
        return self.wo(jax.nn.gelu(self.wi_0(x), approximate=True) * self.wi_1(x))


class Block(nnx.Module):
    """Attention, then the MLP, each on the normed residual stream."""

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.d_model, config.layer_norm_epsilon, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = RMSNorm(config.d_model, config.layer_norm_epsilon, rngs=rngs)
        self.mlp = GatedMLP(config, rngs=rngs)

    def __call__(self, x: Float[Array, "b m d"], mask: Bool[Array, "b m"]) -> Float[Array, "b m d"]:
        x = x + self.attention(self.attention_norm(x), mask)
        return x + self.mlp(self.mlp_norm(x))


class UMT5Encoder(nnx.Module):
    """The encoder half of UMT5 (transformers' `UMT5EncoderModel`); computes in the dtype of its weights."""

    # A file may hold the embedding under either name, or under both.
    TIED: ClassVar = {"encoder.embed_tokens.weight": "shared.weight"}
    FILE_NAMES = (
        ("blocks", "encoder.block"),
        ("attention", "layer.0.SelfAttention"),
        ("attention_norm", "layer.0.layer_norm"),
        ("mlp", "layer.1.DenseReluDense"),
        ("mlp_norm", "layer.1.layer_norm"),
        ("final_layer_norm", "encoder.final_layer_norm"),
    )

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs):
        self.config = config
        self.shared = Embedding(config.vocab_size, config.d_model, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.num_layers)])
        self.final_layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon, rngs=rngs)

    def __call__(self, ids: Int[Array, "b m"], mask: Mask) -> Float[Array, "b m d"]:
        """Embeddings of the tokens `ids`. No token attends to the tokens where `mask` is 0."""
        mask = mask.astype(bool)
        x = self.shared(ids)
        for block in self.blocks:
            x = block(x, mask)
        return self.final_layer_norm(x)


def encode(encoder: UMT5Encoder, ids: Int[Array, "b m"], mask: Mask) -> Float[Array, "b m d"]:
    """The encoder's output with zeros past each prompt's end, as in Helios' training: its attention sees the zeros."""
    return jnp.where(mask.astype(bool)[..., None], encoder(ids, mask), 0)
