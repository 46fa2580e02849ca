"""CLIP's encoders of pictures, short videos (ViCLIP) and texts, as pure functions of their released weights.

Tensors have OpenAI's names. Layers are pre-norm and use QuickGELU; heads have 64 channels.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from helios_jax.pretrained.errors import CheckpointError

HEAD = 64  # channels of an attention head
EPSILON = 1e-5  # of layer norms
LONG = 512  # tokens above which heads attend one after another: all at once, ViCLIP's take several times 0.3 GB
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


# Tensors by name, read when they are called: reading all of ViCLIP's at once would take twice its size.
Tensors = Mapping[str, Callable[[], np.ndarray]]
Heads = Float[Array, "b n heads 64"]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["tensors", "layers"], meta_fields=[])
@dataclass(frozen=True)
class Encoder:
    """Weights of an encoder: `layers` has each tensor of a layer, stacked over layers, in float16 if that is exact."""

    tensors: dict[str, Array]
    layers: dict[str, Array]

    @classmethod
    def of(cls, tensors: Tensors, names: tuple[str, ...], prefix: str, source: str) -> "Encoder":
        """The encoder whose tensors have `prefix`; raises CheckpointError if one is missing."""
        count = len({key.removeprefix(prefix + BLOCK).partition(".")[0] for key in tensors if _starts(key, prefix)})
        blocks = [f"{prefix}{BLOCK}{i}." for i in range(max(count, 1))]
        needed = [prefix + name for name in names] + [block + name for block in blocks for name in LAYER]
        if lacking := [key for key in needed if key not in tensors]:
            raise CheckpointError(f"{source} lacks {lacking[0]} ({len(lacking)} tensors in all): take CLIP's own file")
        return cls(
            {name: jnp.asarray(tensors[prefix + name](), jnp.float32) for name in names},
            {name: jnp.asarray(_stacked([tensors[block + name] for block in blocks])) for name in LAYER},
        )


def _stacked(reads: list[Callable[[], np.ndarray]]) -> np.ndarray:
    """The tensors of all layers, in float16 if that changes no number: CLIP was released so."""
    first = reads[0]()
    stack = np.empty((len(reads), *first.shape), np.float32)
    for i, read in enumerate(reads):
        stack[i] = first if i == 0 else read()
    half = stack.astype(np.float16)
    return half if all(map(np.array_equal, half, stack)) else stack


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
    """Features of one short video; each patch attends to the patches of all frames."""
    x = _patches(encoder, pixels) + encoder.tensors["temporal_positional_embedding"][0, :, None]
    x = jnp.concatenate([_class(encoder), x.reshape(-1, x.shape[-1])], 0)
    return _pooled(encoder, x[None])[0]


@jax.jit
def encode_texts(encoder: Encoder, tokens: Int[Array, "b n"]) -> Float[Array, "b d"]:
    """Features of texts, taken at the end token, which has the greatest number."""
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
    kernel = w.reshape(w.shape[0], 3, *w.shape[-2:])  # ViCLIP's kernel also has a time axis, of length 1
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
        w = jax.lax.optimization_barrier(w)  # else XLA casts the weights of all layers before the first
        w = {name: value.astype(jnp.float32) for name, value in w.items()}
        qkv = _linear(_norm(x, w, "ln_1"), w["attn.in_proj_weight"], w["attn.in_proj_bias"])
        q, k, v = (part.reshape(b, n, c // HEAD, HEAD) for part in jnp.split(qkv, 3, -1))
        x = x + _linear(_attend(q, k, v, causal), w["attn.out_proj.weight"], w["attn.out_proj.bias"])
        hidden = _linear(_norm(x, w, "ln_2"), w["mlp.c_fc.weight"], w["mlp.c_fc.bias"])
        hidden *= jax.nn.sigmoid(1.702 * hidden)
        return x + _linear(hidden, w["mlp.c_proj.weight"], w["mlp.c_proj.bias"]), None

    with jax.default_matmul_precision("highest"):
        return jax.lax.scan(layer, x, encoder.layers)[0]


def _attend(q: Heads, k: Heads, v: Heads, causal: bool) -> Float[Array, "b n c"]:
    b, n = q.shape[:2]
    if n <= LONG:
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal).reshape(b, n, -1)

    def head(qkv: tuple[Array, Array, Array]) -> Float[Array, "b n 1 64"]:
        q, k, v = (x[:, :, None] for x in qkv)
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal)

    heads = jax.lax.map(head, tuple(jnp.moveaxis(x, 2, 0) for x in (q, k, v)))
    return jnp.moveaxis(heads[:, :, :, 0], 0, 2).reshape(b, n, -1)


def _linear(x: Array, weight: Array, bias: Array) -> Array:
    return x @ weight.T + bias


def _norm(x: Array, w: Mapping[str, Array], name: str) -> Array:
    x = x - x.mean(-1, keepdims=True)
    x *= jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + EPSILON)
    return x * w[f"{name}.weight"] + w[f"{name}.bias"]
