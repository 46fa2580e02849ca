"""The Helios transformer: one denoising pass over compressed history and noisy latents (paper section 3)."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from flax import nnx, struct
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from helios_jax.models.attention import Implementation, attention
from helios_jax.models.embeddings import ConditionEmbedder, Patches, coarser
from helios_jax.models.nn import LayerNorm, Linear, RMSNorm, layer_norm, normal, ones, param, zeros
from helios_jax.models.packing import Packing
from helios_jax.models.remat import BLOCK_INPUT, Remat, policy
from helios_jax.models.rope import Rotary, apply_rotary, pad_replicate, rotary

MAX_KEY_SCALE = 10.0  # history keys are multiplied by 1 to 10


@dataclass(unsafe_hash=True)
class TransformerConfig:
    """The architecture, in the names of diffusers' `HeliosTransformer3DModel`; the defaults are the released 14B."""

    CLASS_NAME: ClassVar[str] = "HeliosTransformer3DModel"
    WEIGHTS_NAME: ClassVar[str] = "diffusion_pytorch_model.safetensors"

    patch_size: tuple[int, ...] = (1, 2, 2)
    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    cross_attn_norm: bool = True
    qk_norm: str = "rms_norm_across_heads"
    eps: float = 1e-6
    added_kv_proj_dim: int | None = None
    rope_dim: tuple[int, ...] = (44, 42, 42)
    rope_theta: float = 10000.0
    guidance_cross_attn: bool = True
    zero_history_timestep: bool = True
    has_multi_term_memory_patch: bool = True
    is_amplify_history: bool = False
    history_scale_mode: str = "per_head"

    def __post_init__(self) -> None:
        self.patch_size, self.rope_dim = tuple(self.patch_size), tuple(self.rope_dim)
        self.out_channels = self.out_channels or self.in_channels
        if sum(self.rope_dim) != self.attention_head_dim or any(d % 2 for d in self.rope_dim):
            raise ValueError(
                f"rope_dim {self.rope_dim} must be three even numbers whose sum is attention_head_dim"
                f" ({self.attention_head_dim})"
            )
        if self.history_scale_mode not in ("scalar", "per_head"):
            raise ValueError(f"history_scale_mode is {self.history_scale_mode!r}, not 'scalar' or 'per_head'")
        if self.qk_norm != "rms_norm_across_heads":
            raise ValueError(f"qk_norm is {self.qk_norm!r}: Helios has 'rms_norm_across_heads' only")
        if self.added_kv_proj_dim is not None:
            raise ValueError("added_kv_proj_dim must be null: Helios takes images through its history, not through it")

    @property
    def dim(self) -> int:
        """Width of the residual stream."""
        return self.num_attention_heads * self.attention_head_dim


# The fields of the next two are not annotated with shapes: jax puts things that are no arrays into pytrees, too.
@struct.dataclass
class HistoryLatents:
    """Clean latents that condition the noisy ones, [b, t, h, w, c] at full resolution; mid and long may be absent."""

    short: Any
    mid: Any = None
    long: Any = None


@struct.dataclass
class FrameIndices:
    """Temporal positions of every part's frames, int [b, t], or [1, t] when all samples share them."""

    noisy: Any
    short: Any = None
    mid: Any = None
    long: Any = None


# Keys and values of the text in one block.
TextKV = tuple[Float[Array, "b m heads head_dim"], Float[Array, "b m heads head_dim"]]
# Those of all blocks: one array each when the blocks are stacked, else a tuple over blocks.
TextCache = (
    tuple[Float[Array, "layers b m heads head_dim"], Float[Array, "layers b m heads head_dim"]] | tuple[TextKV, ...]
)


class Attention(nnx.Module):
    """q/k RMS-normalised across all heads, then split into heads."""

    def __init__(self, config: TransformerConfig, *, history_scale: bool, rngs: nnx.Rngs):
        dim, self.heads = config.dim, config.num_attention_heads
        self.to_q = Linear(dim, dim, axes=("embed", "heads"), rngs=rngs)
        self.to_k = Linear(dim, dim, axes=("embed", "heads"), rngs=rngs)
        self.to_v = Linear(dim, dim, axes=("embed", "heads"), rngs=rngs)
        self.to_out = Linear(dim, dim, axes=("heads", "embed"), rngs=rngs)
        self.norm_q = RMSNorm(dim, config.eps, axes=("heads",), rngs=rngs)
        self.norm_k = RMSNorm(dim, config.eps, axes=("heads",), rngs=rngs)
        scales = config.num_attention_heads if config.history_scale_mode == "per_head" else 1
        self.history_key_scale = param(rngs, ones, (scales,), (None,)) if history_scale else None

    def query(self, x: Float[Array, "b n d"]) -> Float[Array, "b n heads head_dim"]:
        return rearrange(self.norm_q(self.to_q(x)), "b n (heads d) -> b n heads d", heads=self.heads)

    def key_value(self, x: Float[Array, "b n d"]) -> TextKV:
        key, value = self.norm_k(self.to_k(x)), self.to_v(x)
        split = "b n (heads d) -> b n heads d"
        return rearrange(key, split, heads=self.heads), rearrange(value, split, heads=self.heads)

    def out(self, x: Float[Array, "b n heads head_dim"]) -> Float[Array, "b n d"]:
        return self.to_out(rearrange(x, "b n heads d -> b n (heads d)"))

    def scale_history(self, key: Float[Array, "b n heads head_dim"], num_history: int):
        """History keys times 1 + 9 sigmoid(s): how strongly the past is attended to."""
        if self.history_key_scale is None or num_history == 0:
            return key
        scale = 1 + jax.nn.sigmoid(self.history_key_scale[...].astype(jnp.float32)) * (MAX_KEY_SCALE - 1)
        history = (jnp.arange(key.shape[1]) < num_history)[None, :, None, None]
        return jnp.where(history, key * scale[:, None], key).astype(key.dtype)


class FeedForward(nnx.Module):
    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.up = Linear(config.dim, config.ffn_dim, axes=("embed", "mlp"), rngs=rngs)
        self.down = Linear(config.ffn_dim, config.dim, axes=("mlp", "embed"), rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return self.down(jax.nn.gelu(self.up(x), approximate=True))


class Block(nnx.Module):
    """Self-attention over history and noisy tokens, cross-attention to the text, feed-forward; all adaLN-gated."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.eps, self.guidance_cross_attn = config.eps, config.guidance_cross_attn
        self.attn1 = Attention(config, history_scale=config.is_amplify_history, rngs=rngs)
        self.attn2 = Attention(config, history_scale=False, rngs=rngs)
        self.norm2 = LayerNorm(config.dim, config.eps, rngs=rngs) if config.cross_attn_norm else None
        self.ffn = FeedForward(config, rngs=rngs)
        self.scale_shift_table = param(rngs, normal(config.dim**-0.5), (1, 6, config.dim), (None, None, "embed"))

    def __call__(
        self,
        x: Float[Array, "b n d"],
        time: Float[Array, "b rows 6 d"],
        table: Rotary,
        text: TextKV,
        packing: Packing,
        *,
        keep_history: bool = True,
        implementation: Implementation | None = None,
    ) -> Float[Array, "b n_out d"]:
        """`keep_history=False` returns the noisy tokens alone: all that is needed after the last block."""
        rows = self.scale_shift_table[...].astype(jnp.float32) + time.astype(jnp.float32)
        num_history = packing.num_history
        start = 0 if keep_history else num_history

        def row(i: int, history: bool = keep_history):
            return packing.rows(rows[:, :, i], history=history)

        def modulate(x, shift: int, history: bool = keep_history):
            return (layer_norm(x, self.eps) * (1 + row(shift + 1, history)) + row(shift, history)).astype(x.dtype)

        normed = modulate(x, 0, history=True)
        key, value = self.attn1.key_value(normed)
        key = self.attn1.scale_history(apply_rotary(key, table), num_history)
        query = apply_rotary(self.attn1.query(normed[:, start:]), (table[0][:, start:], table[1][:, start:]))
        segments = packing.segments(history=keep_history)
        attended = self.attn1.out(attention(query, key, value, segments=segments, implementation=implementation))

        x, num_history = x[:, start:], num_history - start
        x = (x.astype(jnp.float32) + attended.astype(jnp.float32) * row(2)).astype(x.dtype)

        # With guidance_cross_attn the text speaks to the noisy tokens only.
        first = num_history if self.guidance_cross_attn else 0
        noisy = x[:, first:]
        query = self.attn2.query(noisy if self.norm2 is None else self.norm2(noisy))
        noisy = noisy + self.attn2.out(attention(query, *text, implementation=implementation))
        x = jnp.concatenate([x[:, :first], noisy], 1) if first else noisy

        fed = self.ffn(modulate(x, 3)).astype(jnp.float32)
        return (x.astype(jnp.float32) + fed * row(5)).astype(x.dtype)


class OutputNorm(nnx.Module):
    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.eps = config.eps
        self.scale_shift_table = param(rngs, normal(config.dim**-0.5), (1, 2, config.dim), (None, None, "embed"))

    def __call__(self, x: Float[Array, "b n d"], time: Float[Array, "b rows d"], packing: Packing) -> Array:
        """Of the noisy tokens alone."""
        table = self.scale_shift_table[...].astype(jnp.float32)
        shift, scale = (packing.rows(time.astype(jnp.float32) + table[:, i], history=False) for i in (0, 1))
        return (layer_norm(x, self.eps) * (1 + scale) + shift).astype(x.dtype)


class Transformer(nnx.Module):
    """Predicts the velocity of noisy latents, given history, text and time (diffusers' HeliosTransformer3DModel).

    `stacked=True` keeps the blocks as one block whose parameters have a leading layer dimension, run by `lax.scan`:
    short compilation, for training and TPUs. Otherwise blocks are a list and are unrolled: no copies of stacked
    weights, for inference on GPUs. The files and the numbers are the same.
    """

    FILE_NAMES = (("ffn.up", "ffn.net.0.proj"), ("ffn.down", "ffn.net.2"), ("to_out", "to_out.0"))
    FLOAT32 = ("time_embedder", "scale_shift_table", "norm2", "history_key_scale")
    TIED: ClassVar = {"scale_shift_table": "norm_out.scale_shift_table"}  # Wan's name, and ours

    def __init__(self, config: TransformerConfig, *, stacked: bool = False, rngs: nnx.Rngs):
        self.config = config
        patch, dim = config.patch_size, config.dim

        def patches(scale: int) -> Patches:
            return Patches(config.in_channels, dim, tuple(scale * p for p in patch), rngs=rngs)

        self.patch_embedding = patches(1)
        if config.has_multi_term_memory_patch:
            self.patch_short, self.patch_mid, self.patch_long = patches(1), patches(2), patches(4)
        self.condition_embedder = ConditionEmbedder(config.freq_dim, config.text_dim, config.dim, rngs=rngs)
        if stacked:
            keys = jax.random.split(rngs.params(), config.num_layers)
            self.blocks = jax.vmap(lambda key: Block(config, rngs=nnx.Rngs(params=key)))(keys)
        else:
            self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.num_layers)])
        self.norm_out = OutputNorm(config, rngs=rngs)
        values = config.out_channels * patch[0] * patch[1] * patch[2]
        self.proj_out = Linear(dim, values, axes=("embed", None), init=zeros, rngs=rngs)

    @property
    def dtype(self) -> jnp.dtype:
        """What the weights are in and the forward pass computes in."""
        return self.patch_embedding.weight.dtype

    @classmethod
    def abstract(cls, config: TransformerConfig, *, stacked: bool = False) -> "Transformer":
        """The model with shapes in place of arrays. One block is traced, whatever the depth."""
        model = nnx.eval_shape(lambda: cls(config, stacked=True, rngs=nnx.Rngs(0)))
        if not stacked:
            graph, state = nnx.split(model.blocks)

            def layer():
                return nnx.merge(graph, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), state))

            model.blocks = nnx.data(nnx.List([layer() for _ in range(config.num_layers)]))
        return model

    def text_kv(self, embeddings: Float[Array, "b m text_dim"]) -> TextCache:
        """Every block's keys and values of the text: they depend on the prompt alone, so one call serves all steps."""
        text = self.condition_embedder.text(embeddings)
        if isinstance(self.blocks, nnx.List):
            return tuple(block.attn2.key_value(text) for block in self.blocks)
        return jax.lax.map(lambda block: block.attn2.key_value(text), self.blocks)

    def __call__(
        self,
        latents: Float[Array, "b t h w c"],
        timestep: Float[Array, " b"],
        text: TextCache,
        history: HistoryLatents | None = None,
        indices: FrameIndices | None = None,
        *,
        remat: Remat | None = None,
        implementation: Implementation | None = None,
    ) -> Float[Array, "b t h w c_out"]:
        """Velocity (noise minus data) of `latents` at `timestep` (0 to 1000).

        `text` comes from `text_kv`. Computes in the dtype of `latents`. Without `indices` frames count from zero, which
        fits a call without history only. With `remat` the backward pass computes again what that policy does not keep.
        """
        (out,) = self.packed(
            (latents,), timestep[:, None], text, history, indices, remat=remat, implementation=implementation
        )
        return out

    def packed(
        self,
        latents: tuple[Float[Array, "b t _h _w c"], ...],
        timesteps: Float[Array, "b levels"],
        text: TextCache,
        history: HistoryLatents | None = None,
        indices: FrameIndices | None = None,
        *,
        remat: Remat | None = None,
        implementation: Implementation | None = None,
    ) -> tuple[Float[Array, "b t _h _w c_out"], ...]:
        """`__call__` of several latents of the same chunks, such as the levels of the pyramid, as one sequence (NaViT).

        Each has its own timestep and sees its own copy of the history and nothing of the others, so the velocities are
        those of calls on their own.
        """
        return self._run(latents, timesteps, text, history, indices, (), remat, implementation)[0]

    def features(
        self,
        latents: Float[Array, "b t h w c"],
        timestep: Float[Array, " b"],
        text: TextCache,
        history: HistoryLatents | None = None,
        indices: FrameIndices | None = None,
        *,
        blocks: tuple[int, ...],
        remat: Remat | None = None,
        implementation: Implementation | None = None,
    ) -> tuple[Float[Array, "b t h w c_out"], tuple[Float[Array, "b _t _h _w d"], ...]]:
        """The velocity, and what each of `blocks` (numbers from 0) makes of the noisy tokens, on their grid."""
        (out,), kept = self._run((latents,), timestep[:, None], text, history, indices, blocks, remat, implementation)
        t, h, w = (size // p for size, p in zip(latents.shape[1:4], self.config.patch_size))
        return out, tuple(rearrange(x, "b (t h w) d -> b t h w d", t=t, h=h, w=w) for x in kept)

    def _run(
        self,
        latents: tuple[Array, ...],
        timesteps: Array,
        text: TextCache,
        history: HistoryLatents | None,
        indices: FrameIndices | None,
        kept: tuple[int, ...],
        remat: Remat | None,
        implementation: Implementation | None,
    ) -> tuple[tuple[Array, ...], list[Array]]:
        config = self.config
        grids = [tuple(size // p for size, p in zip(x.shape[1:4], config.patch_size)) for x in latents]
        if indices is None:
            indices = FrameIndices(noisy=jnp.arange(grids[0][0])[None])
        x, table, packing = self._tokens(latents, history, indices)

        past = jnp.zeros_like(timesteps[:, :1]) if config.zero_history_timestep else timesteps
        time, modulation = self.condition_embedder.time(jnp.concatenate([past, timesteps], 1), x.dtype)

        def run(block: Block, kv: Any, x: Array, keep_history: bool) -> Array:
            x = checkpoint_name(x, BLOCK_INPUT)
            return block(x, modulation, table, kv, packing, keep_history=keep_history, implementation=implementation)

        if remat is not None:
            # In a scan nothing could take the place of what is computed again.
            run = jax.checkpoint(
                run, static_argnums=3, policy=policy(remat), prevent_cse=isinstance(self.blocks, nnx.List)
            )
        states: Any = []  # noisy tokens after each block, where any are to be kept
        if isinstance(self.blocks, nnx.List):
            for i, (block, kv) in enumerate(zip(self.blocks, text, strict=True)):
                last = i == len(self.blocks) - 1
                with jax.named_scope(f"block_{i}"):
                    x = run(block, kv, x, not last)
                states.append(x if last else x[:, packing.num_history :])
        else:

            def layer(x: Array, xs: Any) -> tuple[Array, Any]:
                block, kv = xs
                x = run(block, kv, x, True)
                return x, x[:, packing.num_history :] if kept else None

            x, states = jax.lax.scan(layer, x, (self.blocks, text))
            x = x[:, packing.num_history :]

        x = self.proj_out(self.norm_out(x, time, packing))
        pt, ph, pw = config.patch_size
        parts = jnp.split(x, np.cumsum(packing.noisy)[:-1], 1)
        out = tuple(
            rearrange(part, "b (t h w) (pt ph pw c) -> b (t pt) (h ph) (w pw) c", t=t, h=h, w=w, pt=pt, ph=ph, pw=pw)
            for part, (t, h, w) in zip(parts, grids)
        )
        return out, [states[i] for i in kept]

    def _tokens(
        self, latents: tuple[Array, ...], history: HistoryLatents | None, indices: FrameIndices
    ) -> tuple[Float[Array, "b n d"], Rotary, Packing]:
        """Tokens in the order long, mid, short, noisy (the history once for each of the latents), with their rotary
        tables."""
        dims, theta = self.config.rope_dim, self.config.rope_theta
        patch = self.config.patch_size

        def grid(frames, x, pool=1):
            return rotary(jnp.asarray(frames), *x.shape[2:4], dims=dims, theta=theta, pool=pool)

        past = []
        if history is not None:
            short = self.patch_short(history.short)
            past.append((short, grid(indices.short, short)))
            for scale, conv, frames, at in (
                (2, "patch_mid", history.mid, indices.mid),
                (4, "patch_long", history.long, indices.long),
            ):
                if frames is not None:
                    padded = pad_replicate(frames, tuple(scale * p for p in patch))
                    past.append((getattr(self, conv)(padded), grid(at, short, pool=scale)))
        past.reverse()
        noisy = [(x, grid(indices.noisy, x)) for x in map(self.patch_embedding, latents)]
        packing = Packing(
            history=sum(math.prod(x.shape[1:4]) for x, _ in past),
            noisy=tuple(math.prod(x.shape[1:4]) for x, _ in noisy),
        )
        parts = past * len(latents) + noisy
        tokens = jnp.concatenate([rearrange(x, "b t h w d -> b (t h w) d") for x, _ in parts], 1)
        cos, sin = (jnp.concatenate(tables, 1) for tables in _shared_batch([table for _, table in parts]))
        return tokens, (cos, sin), packing


def _shared_batch(tables: list) -> tuple[list, list]:
    """cos tables and sin tables, those with batch 1 repeated when another part has positions per sample."""
    b = max(cos.shape[0] for cos, _ in tables)

    def spread(x):
        return x if x.shape[0] == b else repeat(x, "1 n p -> b n p", b=b)

    return [spread(cos) for cos, _ in tables], [spread(sin) for _, sin in tables]


# How much coarser than the patch embedding each part of the history is.
MEMORY_PATCHES = {"patch_short": 1, "patch_mid": 2, "patch_long": 4}


def init_memory_patches(model: Transformer) -> Transformer:
    """Short, mid and long patches start as the patch embedding: upstream's initialisation from Wan's weights."""
    for name, scale in MEMORY_PATCHES.items():
        patches = getattr(model, name)
        patches.weight[...], patches.bias[...] = coarser(model.patch_embedding, scale)
    return model
