"""CLIP's encoders of pictures, short videos (ViCLIP) and texts, as pure functions of their released weights.

Tensors have OpenAI's names. Layers run before their norms and use QuickGELU; heads have 64 channels.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from helios_jax.pretrained.errors import CheckpointError

HEAD = 64  # channels of an attention head
EPSILON = 1e-5  # of layer norms
BLOCK = "transformer.resblocks."
LAYER = (
    *(f"{norm}.{part}" for norm in ("ln_1", "ln_2") for part in ("weight", "bias")),
    *("attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight", "attn.out_proj.bias"),
    *(f"mlp.{name}.{part}" for name in ("c_fc", "c_proj") for part in ("weight", "bias")),
)
PICTURES = (
    *("conv1.weight", "class_embedding", "positional_embedding", "proj"),
    *(f"{norm}.{part}" for norm in ("ln_pre", "ln_post") for part in ("weight", "bias")),
)
VIDEOS = (*PICTURES, "temporal_positional_embedding")
TEXTS = ("token_embedding.weight", "positional_embedding", "ln_final.weight", "ln_final.bias", "text_projection")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["tensors", "layers"], meta_fields=[])
@dataclass(frozen=True)
class Encoder:
    """Weights of an encoder: `layers` holds those of all layers, stacked, in float16 where they are such numbers."""

    tensors: dict[str, Array]
    layers: dict[str, Array]

    @classmethod
    def of(cls, arrays: dict[str, np.ndarray], names: tuple[str, ...], prefix: str, source: str) -> "Encoder":
        """The encoder whose tensors have `prefix` in `arrays`, from which they are taken out to save memory.

        Raises CheckpointError if one is missing.
        """
        count = len({key.removeprefix(prefix + BLOCK).partition(".")[0] for key in arrays if _starts(key, prefix)})
        needed = [prefix + name for name in names]
        needed += [f"{prefix}{BLOCK}{i}.{name}" for i in range(max(count, 1)) for name in LAYER]
        if lacking := [key for key in needed if key not in arrays]:
            raise CheckpointError(f"{source} lacks {lacking[0]} ({len(lacking)} tensors in all): take CLIP's own file")
        tensors = {name: jnp.asarray(arrays.pop(prefix + name), jnp.float32) for name in names}
        blocks = [f"{prefix}{BLOCK}{i}." for i in range(count)]
        layers = {name: jnp.asarray(_smallest([arrays.pop(block + name) for block in blocks])) for name in LAYER}
        return cls(tensors, layers)


def _smallest(arrays: list[np.ndarray]) -> np.ndarray:
    """The arrays stacked, in float16 if that changes no number: CLIP was released so."""
    halves = [array.astype(np.float16) for array in arrays]
    return np.stack(halves if all(map(np.array_equal, halves, arrays)) else arrays)


def _starts(key: str, prefix: str) -> bool:
    return key.startswith(prefix + BLOCK)


@jax.jit
def encode_pictures(encoder: Encoder, pixels: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
    """Features of normalized pictures."""
    x = _patches(encoder, pixels)
    x = jnp.concatenate([jnp.broadcast_to(_class(encoder), (len(x), 1, x.shape[-1])), x], 1)
    return _pooled(encoder, x)


@jax.jit
def encode_video(encoder: Encoder, pixels: Float[Array, "t h w 3"]) -> Float[Array, " d"]:
    """Features of one short video, whose patches attend to those of all its frames."""
    x = _patches(encoder, pixels) + encoder.tensors["temporal_positional_embedding"][0, :, None]
    x = jnp.concatenate([_class(encoder), x.reshape(-1, x.shape[-1])], 0)
    return _pooled(encoder, x[None])[0]


@jax.jit
def encode_texts(encoder: Encoder, tokens: Int[Array, "b n"]) -> Float[Array, "b d"]:
    """Features of texts, taken at their end, which is the greatest token."""
    w = encoder.tensors
    x = w["token_embedding.weight"][tokens] + w["positional_embedding"]
    x = _norm(_transform(encoder, x, causal=True), w, "ln_final")
    return x[jnp.arange(len(x)), tokens.argmax(-1)] @ w["text_projection"]


def normalize(features: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """Features of length 1."""
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True)


def _class(encoder: Encoder) -> Float[Array, "1 c"]:
    w = encoder.tensors
    return w["class_embedding"][None] + w["positional_embedding"][:1]


def _patches(encoder: Encoder, pixels: Float[Array, "b h w 3"]) -> Float[Array, "b n c"]:
    """The embedded patches of pictures, with their positions."""
    w = encoder.tensors["conv1.weight"]
    kernel = w.reshape(w.shape[0], 3, *w.shape[-2:])  # of a video it has a time of 1
    x = jax.lax.conv_general_dilated(
        pixels, kernel, kernel.shape[2:], "VALID", dimension_numbers=("NHWC", "OIHW", "NHWC"), precision="highest"
    )
    return x.reshape(len(x), -1, x.shape[-1]) + encoder.tensors["positional_embedding"][1:]


def _pooled(encoder: Encoder, x: Float[Array, "b n c"]) -> Float[Array, "b d"]:
    """The class token after all layers, projected."""
    w = encoder.tensors
    x = _transform(encoder, _norm(x, w, "ln_pre"), causal=False)
    return jnp.matmul(_norm(x[:, 0], w, "ln_post"), w["proj"], precision="highest")


def _transform(encoder: Encoder, x: Float[Array, "b n c"], causal: bool) -> Float[Array, "b n c"]:
    def layer(x: Float[Array, "b n c"], w: dict[str, Array]) -> tuple[Float[Array, "b n c"], None]:
        b, n, c = x.shape
        w = {name: value.astype(jnp.float32) for name, value in w.items()}
        qkv = _linear(_norm(x, w, "ln_1"), w["attn.in_proj_weight"], w["attn.in_proj_bias"])
        q, k, v = (part.reshape(b, n, c // HEAD, HEAD) for part in jnp.split(qkv, 3, -1))
        heads = jax.nn.dot_product_attention(q, k, v, is_causal=causal)
        x = x + _linear(heads.reshape(b, n, c), w["attn.out_proj.weight"], w["attn.out_proj.bias"])
        hidden = _linear(_norm(x, w, "ln_2"), w["mlp.c_fc.weight"], w["mlp.c_fc.bias"])
        hidden *= jax.nn.sigmoid(1.702 * hidden)
        return x + _linear(hidden, w["mlp.c_proj.weight"], w["mlp.c_proj.bias"]), None

    with jax.default_matmul_precision("highest"):
        return jax.lax.scan(layer, x, encoder.layers)[0]


def _linear(x: Array, weight: Array, bias: Array) -> Array:
    return x @ weight.T + bias


def _norm(x: Array, w: Mapping[str, Array], name: str) -> Array:
    x = x - x.mean(-1, keepdims=True)
    x *= jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + EPSILON)
    return x * w[f"{name}.weight"] + w[f"{name}.bias"]
