"""The Helios transformer's configuration, and one block of it."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from helios_jax.models.layers import INNER, LayerNorm, Linear, RMSNorm, normal, ones, param
from helios_jax.models.ops import attention as attentions
from helios_jax.models.ops import context_attention, norms
from helios_jax.models.ops.attention import attention
from helios_jax.models.ops.choices import DEVICE, Implementations
from helios_jax.models.transformer.packing import Packing
from helios_jax.models.transformer.rope import Rotary
from helios_jax.sharding import CONTEXT

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
        sizes = ("num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "text_dim", "freq_dim")
        for name in (*sizes, "ffn_dim", "num_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if len(self.patch_size) != 3 or min(self.patch_size) < 1:
            raise ValueError(f"patch_size {self.patch_size} must be three numbers, each at least 1")
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


# Keys and values of the text in one block.
TextKV = tuple[Float[Array, "b m heads head_dim"], Float[Array, "b m heads head_dim"]]


class Attention(nnx.Module):
    """Projections of attention; queries and keys are RMS-normalised across all heads, then split into heads."""

    def __init__(self, config: TransformerConfig, *, history_scale: bool, rngs: nnx.Rngs):
        dim, self.heads = config.dim, config.num_attention_heads
        self.to_q = Linear(dim, dim, axes=("embed", "heads"), output=INNER, rngs=rngs)
        self.to_k = Linear(dim, dim, axes=("embed", "heads"), output=INNER, rngs=rngs)
        self.to_v = Linear(dim, dim, axes=("embed", "heads"), rngs=rngs)
        self.to_out = Linear(dim, dim, axes=("heads", "embed"), rngs=rngs)
        self.norm_q = RMSNorm(dim, config.eps, axes=("heads",), rngs=rngs)
        self.norm_k = RMSNorm(dim, config.eps, axes=("heads",), rngs=rngs)
        scales = config.num_attention_heads if config.history_scale_mode == "per_head" else 1
        self.history_key_scale = param(rngs, ones, (scales,), (None,)) if history_scale else None

    def query(
        self, x: Float[Array, "b n d"], table: Rotary | None = None, by: norms.Choice = "xla"
    ) -> Float[Array, "b n heads head_dim"]:
        return self._normed(self.norm_q, self.to_q(x), table, None, 0, by)

    def key_value(
        self, x: Float[Array, "b n d"], table: Rotary | None = None, num_history: int = 0, by: norms.Choice = "xla"
    ) -> TextKV:
        """Keys and values. With a learnt scale s, the first `num_history` keys are multiplied by 1 + 9 sigmoid(s): how
        strongly the history is attended to."""
        scale = self.history_key_scale
        if scale is not None:
            scale = 1 + jax.nn.sigmoid(scale[...].astype(jnp.float32)) * (MAX_KEY_SCALE - 1)
        key = self._normed(self.norm_k, self.to_k(x), table, scale, num_history, by)
        if norms.head_major(by):
            return key, self.to_v.to_heads(x, self.heads)
        return key, rearrange(self.to_v(x), "b n (heads d) -> b n heads d", heads=self.heads)

    def _normed(
        self, norm: RMSNorm, x: Array, table: Rotary | None, scale: Array | None, num_history: int, by
    ) -> Array:
        return norms.norm_rope(x, norm.weight[...], self.heads, norm.eps, table, scale, num_history, by)

    def out(self, x: Float[Array, "b n heads head_dim"], by: norms.Choice = "xla") -> Float[Array, "b n d"]:
        if norms.head_major(by):
            return self.to_out.from_heads(x)
        return self.to_out(rearrange(x, "b n heads d -> b n (heads d)"))


class FeedForward(nnx.Module):
    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.up = Linear(config.dim, config.ffn_dim, axes=("embed", "mlp"), output=INNER, rngs=rngs)
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
        implementations: Implementations = DEVICE,
    ) -> Float[Array, "b n_out d"]:
        """The tokens after the block; `keep_history=False`, for the last block, returns the noisy ones only.

        `time` has six modulations for each row of `packing.rows`, `table` are the rotary tables of the tokens, and
        `text` are the block's keys and values of the text.
        """
        rows = self.scale_shift_table[...].astype(jnp.float32) + time.astype(jnp.float32)
        num_history = packing.num_history
        start = 0 if keep_history else num_history
        by = norms.choose(x, self.attn1.heads, implementations.norms)

        def row(i: int, history: bool = keep_history):
            return packing.rows(rows[:, :, i], history=history)

        @jax.named_scope("norms")
        def modulate(x, shift: int, history: bool = keep_history):
            (shifts, runs), (scales, _) = (packing.runs(rows[:, :, i], history=history) for i in (shift, shift + 1))
            return norms.adaln(x, shifts, scales, runs, self.eps, by)

        normed = modulate(x, 0, history=True)
        with jax.named_scope("self_attention"):
            key, value = self.attn1.key_value(normed, table, num_history, by)
            query = self.attn1.query(normed[:, start:], (table[0][:, start:], table[1][:, start:]), by)
            segments = packing.segments(history=keep_history)
            attended = attention(
                query,
                key,
                value,
                segments=segments,
                num_keys=packing.num_tokens,
                present=packing.present(),
                context=implementations.context,
                implementation=implementations.attention,
            )
            attended = self.attn1.out(attended, by)

        x, num_history = x[:, start:], num_history - start
        # With guidance_cross_attn, only noisy tokens attend to the text.
        first = num_history if self.guidance_cross_attn else 0
        with jax.named_scope("norms"):
            if self.norm2 is not None and norms.fuses_residual(by):
                gate, runs = packing.runs(rows[:, :, 2], history=keep_history and first == 0)
                shift, gain = (
                    jnp.broadcast_to(p[...], (1, *gate.shape[1:])) for p in (self.norm2.bias, self.norm2.weight)
                )
                noisy, normed = norms.gated_residual(x, attended, gate, shift, gain, runs, self.eps, by)
                past = _residual(x[:, :first], attended[:, :first], row(2)[:, :first])
            else:
                x = _residual(x, attended, row(2))
                past, noisy = x[:, :first], x[:, first:]
                normed = noisy if self.norm2 is None else self.norm2(noisy)

        with jax.named_scope("cross_attention"):
            query = self.attn2.query(normed, by=by)
            read = attention(query, *text, implementation=implementations.attention)
            noisy = noisy + self.attn2.out(read, by)
        x = jnp.concatenate([past, noisy], 1) if first else noisy

        normed = modulate(x, 3)
        with jax.named_scope("feed_forward"):
            fed = self.ffn(normed)
        with jax.named_scope("norms"):
            return _residual(x, fed, row(5))


def check_implementations(asked: Implementations, config: TransformerConfig, dtype: Any, mesh: Any = None) -> None:
    """Raises ValueError if an implementation asked for cannot run here, or over `mesh`, with tokens of `dtype`.

    It needs no weights, so that the error precedes their loading.
    """
    context_attention.check(asked.context, config.num_attention_heads, mesh)
    shared = mesh is not None and mesh.shape[CONTEXT] > 1
    attentions.check(asked.attention, config.attention_head_dim, dtype, asked.context if shared else None)
    norms.check(asked.norms, config.num_attention_heads, config.dim, dtype)


def _residual(
    x: Float[Array, "b n d"], y: Float[Array, "b n d"], gate: Float[Array, " b #n d"]
) -> Float[Array, "b n d"]:
    return (x.astype(jnp.float32) + y.astype(jnp.float32) * gate).astype(x.dtype)
