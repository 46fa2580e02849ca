"""The Helios transformer: one denoising pass over compressed history and noisy latents (paper section 3)."""

import math
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from helios_jax.models.layers import Linear, Shapes, layer_norm, normal, param, zeros
from helios_jax.models.ops import mesh_axes
from helios_jax.models.ops.choices import DEVICE, Implementations
from helios_jax.models.transformer.block import Block, TextKV, TransformerConfig
from helios_jax.models.transformer.embeddings import ConditionEmbedder, Patches, coarser
from helios_jax.models.transformer.history import MEMORY_PATCHES, SCALES, FrameIndices, HistoryLatents, Scale, kernel
from helios_jax.models.transformer.packing import Packing
from helios_jax.models.transformer.remat import BLOCK_INPUT, Remat, policy
from helios_jax.models.transformer.rope import Rotary, pad_replicate, rotary
from helios_jax.sharding import CONTEXT

# Keys and values of all blocks: one array each when the blocks are stacked, else a tuple over blocks.
TextCache = (
    tuple[Float[Array, "layers b m heads head_dim"], Float[Array, "layers b m heads head_dim"]] | tuple[TextKV, ...]
)


class OutputNorm(nnx.Module):
    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.eps = config.eps
        self.scale_shift_table = param(rngs, normal(config.dim**-0.5), (1, 2, config.dim), (None, None, "embed"))

    def __call__(self, x: Float[Array, "b n d"], time: Float[Array, "b rows d"], packing: Packing) -> Array:
        """Norms the noisy tokens; the history has no output."""
        table = self.scale_shift_table[...].astype(jnp.float32)
        shift, scale = (packing.rows(time.astype(jnp.float32) + table[:, i], history=False) for i in (0, 1))
        return (layer_norm(x, self.eps) * (1 + scale) + shift).astype(x.dtype)


class Transformer(nnx.Module):
    """Predicts the velocity of noisy latents, given history, text and time (diffusers' HeliosTransformer3DModel).

    `stacked=True` keeps the blocks as one block whose parameters have a leading layer dimension, run by `lax.scan`:
    short compilation, for training and TPUs. Otherwise blocks are a list and are unrolled: no copies of stacked
    weights, for inference on GPUs. The files and the numbers are the same. `unroll` unrolls the loop over stacked
    blocks, for small models, where the loop's copies take longer than the blocks. `implementations` are those of every
    call.
    """

    FILE_NAMES = (("ffn.up", "ffn.net.0.proj"), ("ffn.down", "ffn.net.2"), ("to_out", "to_out.0"))
    FLOAT32 = ("time_embedder", "scale_shift_table", "norm2", "history_key_scale")
    TIED: ClassVar = {"scale_shift_table": "norm_out.scale_shift_table"}  # Wan's name, and ours

    def __init__(
        self,
        config: TransformerConfig,
        *,
        stacked: bool = False,
        unroll: bool = False,
        implementations: Implementations = DEVICE,
        rngs: nnx.Rngs,
    ):
        self.config, self.implementations, self.unroll = config, implementations, unroll
        patch, dim = config.patch_size, config.dim

        self.patch_embedding = Patches(config.in_channels, dim, patch, rngs=rngs)
        if config.has_multi_term_memory_patch:
            for name, scale in MEMORY_PATCHES.items():
                setattr(self, name, Patches(config.in_channels, dim, kernel(patch, scale), rngs=rngs))
        self.condition_embedder = ConditionEmbedder(config.freq_dim, config.text_dim, config.dim, rngs=rngs)
        layers = config.num_layers
        if not stacked:
            self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(layers)])
        elif isinstance(rngs, Shapes):
            block = Block(config, rngs=rngs)
            self.blocks = jax.tree.map(lambda x: jax.ShapeDtypeStruct((layers, *x.shape), x.dtype), block)
        else:
            keys = jax.random.split(rngs.params(), layers)
            self.blocks = jax.vmap(lambda key: Block(config, rngs=nnx.Rngs(params=key)))(keys)
        self.norm_out = OutputNorm(config, rngs=rngs)
        values = config.out_channels * patch[0] * patch[1] * patch[2]
        self.proj_out = Linear(dim, values, axes=("embed", None), init=zeros, rngs=rngs)

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the weights and of the forward pass."""
        return self.patch_embedding.weight.dtype

    @classmethod
    def abstract(
        cls,
        config: TransformerConfig,
        *,
        stacked: bool = False,
        unroll: bool = False,
        implementations: Implementations = DEVICE,
    ) -> "Transformer":
        """The model with shapes in place of arrays."""
        return cls(config, stacked=stacked, unroll=unroll, implementations=implementations, rngs=Shapes())

    def text_kv(self, embeddings: Float[Array, "b m text_dim"]) -> TextCache:
        """Every block's keys and values of the text: they depend on the prompt alone, so one call serves all steps."""
        text = self.condition_embedder.text(embeddings)
        if isinstance(self.blocks, nnx.List):
            return tuple(block.attn2.key_value(text) for block in self.blocks)

        # Rematerialized: else a gradient would keep float32 intermediates of all blocks.
        @partial(jax.checkpoint, prevent_cse=False)
        def key_value(block: Block) -> TextKV:
            return block.attn2.key_value(text)

        return jax.lax.map(key_value, self.blocks)

    def __call__(
        self,
        latents: Float[Array, "b t h w c"],
        timestep: Float[Array, " b"],
        text: TextCache,
        history: HistoryLatents | None = None,
        indices: FrameIndices | None = None,
        *,
        remat: Remat | None = None,
    ) -> Float[Array, "b t h w c_out"]:
        """Velocity (noise minus data) of `latents` at `timestep` (0 to 1000).

        `text` comes from `text_kv`. Computes in the dtype of `latents`. Without `indices` frames count from zero, which
        fits a call without history only. `remat` is the rematerialization policy for the backward pass (None: none).
        """
        (out,) = self.packed((latents,), timestep[:, None], text, history, indices, remat=remat)
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
    ) -> tuple[Float[Array, "b t _h _w c_out"], ...]:
        """`__call__` of several latents of the same chunks, such as the levels of the pyramid, as one sequence (NaViT).

        Each has its own timestep and attends only to itself and its own copy of the history, so the velocities are
        those of separate calls.
        """
        return self._run(latents, timesteps, text, history, indices, (), remat)[0]

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
    ) -> tuple[Float[Array, "b t h w c_out"], tuple[Float[Array, "b _t _h _w d"], ...]]:
        """The velocity, and the noisy tokens after each of `blocks` (numbers from 0), on their grid."""
        (out,), kept = self._run((latents,), timestep[:, None], text, history, indices, blocks, remat)
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
    ) -> tuple[tuple[Array, ...], list[Array]]:
        config = self.config
        grids = [tuple(size // p for size, p in zip(x.shape[1:4], config.patch_size)) for x in latents]
        if indices is None:
            indices = FrameIndices(noisy=jnp.arange(grids[0][0])[None])
        x, table, packing = self._tokens(latents, history, indices)

        past = jnp.zeros_like(timesteps[:, :1]) if config.zero_history_timestep else timesteps
        time, modulation = self.condition_embedder.time(jnp.concatenate([past, timesteps], 1), x.dtype)

        run = partial(
            _pass,
            packing=packing,
            kept=kept,
            remat=remat,
            unroll=self.unroll,
            implementations=self.implementations,
        )
        if packing.whole is not None:
            tokens = PartitionSpec(None, CONTEXT)
            whole = PartitionSpec()
            run = mesh_axes.over_context(run, (whole, tokens, tokens, whole, whole, whole), tokens)
        layers = self.blocks, self.norm_out, self.proj_out
        x, states = run(layers, x, table, text, time, modulation)

        pt, ph, pw = config.patch_size
        out = tuple(
            rearrange(part, "b (t h w) (pt ph pw c) -> b (t pt) (h ph) (w pw) c", t=t, h=h, w=w, pt=pt, ph=ph, pw=pw)
            for part, (t, h, w) in zip(packing.noisy_parts(x), grids)
        )
        return out, [jnp.concatenate(packing.noisy_parts(state), 1) for state in states]

    def _tokens(
        self, latents: tuple[Array, ...], history: HistoryLatents | None, indices: FrameIndices
    ) -> tuple[Float[Array, "b n d"], Rotary, Packing]:
        """Tokens of the history, far to near (once for each of the latents), then the noisy ones; with their rotary
        tables."""
        dims, theta, patch = self.config.rope_dim, self.config.rope_theta, self.config.patch_size

        def tokens_of(patches: Patches, frames: Array, at: Any, scale: Scale = (1, 1, 1)) -> tuple[Array, Rotary]:
            height, width = (size // p for size, p in zip(frames.shape[2:4], patch[1:]))
            table = rotary(jnp.asarray(at), height, width, dims=dims, theta=theta, pool=scale)
            return patches(pad_replicate(frames, kernel(patch, scale))), table

        past = [
            tokens_of(getattr(self, f"patch_{part}"), frames, getattr(indices, part), scale)
            for part, scale in reversed(SCALES.items())
            if (frames := getattr(history, part, None)) is not None
        ]
        noisy = [tokens_of(self.patch_embedding, x, indices.noisy) for x in latents]
        packing = Packing(
            history=sum(math.prod(x.shape[1:4]) for x, _ in past),
            noisy=tuple(math.prod(x.shape[1:4]) for x, _ in noisy),
        ).shared(mesh_axes.size(CONTEXT))
        parts = past * len(latents) + noisy
        tokens = jnp.concatenate([rearrange(x, "b t h w d -> b (t h w) d") for x, _ in parts], 1)
        cos, sin = (jnp.concatenate(tables, 1) for tables in _shared_batch([table for _, table in parts]))
        tokens, cos, sin = (packing.laid_out(x) for x in (tokens, cos, sin))
        return tokens, (cos, sin), packing


def _pass(
    layers: tuple[Any, OutputNorm, Linear],
    x: Float[Array, "b n d"],
    table: Rotary,
    text: TextCache,
    time: Float[Array, "b rows d"],
    modulation: Float[Array, "b rows 6 d"],
    *,
    packing: Packing,
    kept: tuple[int, ...],
    remat: Remat | None,
    unroll: bool,
    implementations: Implementations,
) -> tuple[Float[Array, "b noisy values"], list[Float[Array, "b noisy d"]]]:
    """Runs `layers`: the blocks, the norm of their output and its projection. Where tokens are split over devices, each
    device runs it on its share.

    Returns the output's values of the noisy tokens, and the noisy tokens after each of the blocks `kept`.
    """
    blocks, norm_out, proj_out = layers

    def run(block: Block, kv: Any, x: Array, keep_history: bool) -> Array:
        x = checkpoint_name(x, BLOCK_INPUT)
        return block(x, modulation, table, kv, packing, keep_history=keep_history, implementations=implementations)

    if remat is not None:
        # Inside a scan, XLA cannot replace the recomputation by the first results (CSE), so nothing must prevent that.
        unrolled = unroll or isinstance(blocks, nnx.List)
        run = jax.checkpoint(run, static_argnums=3, policy=policy(remat), prevent_cse=unrolled)
    states: Any = []  # noisy tokens after blocks
    if isinstance(blocks, nnx.List):
        for i, (block, kv) in enumerate(zip(blocks, text, strict=True)):
            last = i == len(blocks) - 1
            with jax.named_scope(f"block_{i}"):
                x = run(block, kv, x, not last)
            states.append(x if last else x[:, packing.num_history :])
    else:
        # Each kept block has a place, and all others share one more: the tokens of all blocks would fill the memory.
        count = len(jax.tree.leaves(text)[0])
        places = [kept.index(i) if i in kept else len(kept) for i in range(count)]

        def layer(carry: tuple[Array, Array | None], xs: Any) -> tuple[Any, None]:
            (x, states), (block, kv, place) = carry, xs
            x = run(block, kv, x, True)
            if states is not None:
                states = jax.lax.dynamic_update_index_in_dim(states, x[:, packing.num_history :], place, 0)
            return (x, states), None

        first = jnp.zeros((len(kept) + 1, *x[:, packing.num_history :].shape), x.dtype) if kept else None
        (x, states), _ = jax.lax.scan(layer, (x, first), (blocks, text, jnp.array(places)), unroll=unroll)
        return proj_out(norm_out(x[:, packing.num_history :], time, packing)), [states[kept.index(i)] for i in kept]
    return proj_out(norm_out(x, time, packing)), [states[i] for i in kept]


def _shared_batch(tables: list) -> tuple[list, list]:
    """cos tables and sin tables, those with batch 1 repeated when another part has positions per sample."""
    b = max(cos.shape[0] for cos, _ in tables)

    def spread(x):
        return x if x.shape[0] == b else repeat(x, "1 n p -> b n p", b=b)

    return [spread(cos) for cos, _ in tables], [spread(sin) for _, sin in tables]


def init_memory_patches(model: Transformer) -> Transformer:
    """The history's patches start as the patch embedding: upstream's initialisation from Wan's weights."""
    for name, scale in MEMORY_PATCHES.items():
        patches = getattr(model, name)
        patches.weight[...], patches.bias[...] = coarser(model.patch_embedding, scale)
    return model
