"""The programs of the released 14B model at 384 x 640 as functions and the shapes of their arguments, in bfloat16."""

import re
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from helios_jax.diffusion import memory
from helios_jax.models.ops.choices import DEVICE, Implementations
from helios_jax.models.transformer import Transformer
from helios_jax.models.transformer.block import Block, TransformerConfig
from helios_jax.models.transformer.packing import Packing
from helios_jax.models.vae import AutoencoderKLWan, VAEConfig

HISTORY, NOISY, TEXT = 2400, 8640, 512  # tokens
LATENTS = (1, 9, 48, 80, 16)
CONFIG = TransformerConfig()


def shape(*sizes: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def half(tree: Any) -> Any:
    """Shapes with bfloat16 in place of float32."""
    return jax.tree.map(lambda x: shape(*x.shape, dtype=jnp.bfloat16 if x.dtype == jnp.float32 else x.dtype), tree)


def block(
    implementations: Implementations = DEVICE, dtype: Any = jnp.bfloat16, noisy: int = NOISY
) -> tuple[Any, tuple[Any, ...]]:
    """One of the 40 blocks, over the history and a chunk, at full size unless it has fewer `noisy` tokens."""
    padding = -(HISTORY + noisy) % 8
    tokens, angles = HISTORY + noisy + padding, CONFIG.attention_head_dim // 2
    heads = (CONFIG.num_attention_heads, CONFIG.attention_head_dim)
    arguments = (
        half(nnx.eval_shape(lambda: Block(CONFIG, rngs=nnx.Rngs(0)))),
        shape(1, tokens, CONFIG.dim),
        shape(1, 2, 6, CONFIG.dim, dtype=jnp.float32),
        (shape(1, tokens, angles, dtype=jnp.float32),) * 2,
        (shape(1, TEXT, *heads),) * 2,
    )
    arguments = jax.tree.map(lambda x: shape(*x.shape, dtype=dtype if x.dtype == jnp.bfloat16 else x.dtype), arguments)
    packing = Packing(HISTORY, (noisy,), padding)

    def run(block, x, time, table, text):
        return block(x, time, table, text, packing, implementations=implementations)

    return run, arguments


def transformer() -> tuple[Any, tuple[Any, ...]]:
    """A whole pass of the unrolled model over a chunk at full size."""
    model, config = half(Transformer.abstract(CONFIG)), memory.MemoryConfig()
    history = half(jax.eval_shape(lambda: memory.empty(config, 1, *LATENTS[2:])))
    text = jax.eval_shape(lambda model, x: model.text_kv(x), model, shape(1, TEXT, CONFIG.text_dim))

    def run(model, latents, time, text, history):
        return model(latents, time, text, *memory.window(config, history))

    return run, (model, shape(*LATENTS), shape(1, dtype=jnp.float32), text, history)


def decoder() -> tuple[Any, tuple[Any, ...]]:
    """33 frames of 384 x 640 from their 9 latent ones, at once."""
    vae = half(nnx.eval_shape(lambda: AutoencoderKLWan(VAEConfig(), rngs=nnx.Rngs(0))))
    return lambda vae, latents: vae.decode(latents), (vae, shape(*LATENTS))


COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def collectives(program: Any) -> Counter[str]:
    """Counts each kind of collective in `program`; the body of a loop counts once."""
    found = re.findall(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", program.as_text())
    return Counter(found)


def custom_calls(program: Any) -> Counter[str]:
    """Counts the calls of libraries and kernels in `program`, by target, such as "__cudnn$fmhaSoftmax"."""
    return Counter(re.findall(r'custom_call_target="([^"]+)"', program.as_text()))
