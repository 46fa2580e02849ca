"""Embeddings of latents, timesteps and text in the transformer's width."""

import math

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from helios_jax.models.layers import Linear, lecun_normal, param, with_adapters, zeros


def timestep_features(timestep: Float[Array, " n"], dim: int) -> Float[Array, "n dim"]:
    """cos, then sin, of the timestep (0 to 1000) at dim/2 frequencies from 1 to 1/10000, float32."""
    frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(dim // 2, dtype=jnp.float32) / (dim // 2))
    angles = timestep.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


class Patches(nnx.Module):
    """A convolution whose stride is its kernel, [kt, kh, kw, in, out]: one matrix product over patches."""

    def __init__(self, in_features: int, dim: int, kernel: tuple[int, ...], *, rngs: nnx.Rngs):
        spatial = (None,) * len(kernel)
        self.weight = param(rngs, lecun_normal(), (*kernel, in_features, dim), (*spatial, None, "embed"), "conv")
        self.bias = param(rngs, zeros, (dim,), ("embed",))
        self.adapters: nnx.List | None = None

    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t2 h2 w2 d"]:
        i, j, k, c, d = self.weight.shape
        patches = rearrange(x, "b (t i) (h j) (w k) c -> b t h w (i j k c)", i=i, j=j, k=k)
        y = patches @ self.weight[...].reshape(i * j * k * c, d).astype(x.dtype) + self.bias[...].astype(x.dtype)
        return with_adapters(y, patches, self.adapters)


def coarser(source: Patches, scale: tuple[int, int, int]) -> tuple[Float[Array, "kt kh kw c d"], Float[Array, " d"]]:
    """Weight and bias for patches `scale` times as large: the weights repeated over the larger kernel and divided.

    So they embed a block as `source` embeds the mean of the block over `scale`.
    """
    weight = source.weight[...] / math.prod(scale)
    for axis, times in enumerate(scale):
        weight = jnp.repeat(weight, times, axis)
    return weight, source.bias[...]


class Embedder(nnx.Module):
    """Linear, activation, Linear."""

    def __init__(self, in_features: int, dim: int, axis: str | None, *, rngs: nnx.Rngs):
        self.linear_1 = Linear(in_features, dim, axes=(axis, "embed"), rngs=rngs)
        self.linear_2 = Linear(dim, dim, axes=("embed", "embed_out"), rngs=rngs)


class ConditionEmbedder(nnx.Module):
    """Timestep -> modulation rows; text embeddings -> the transformer's width."""

    def __init__(self, freq_dim: int, text_dim: int, dim: int, *, rngs: nnx.Rngs):
        self.freq_dim = freq_dim
        self.time_embedder = Embedder(freq_dim, dim, None, rngs=rngs)
        self.time_proj = Linear(dim, 6 * dim, axes=("embed", "embed_out"), rngs=rngs)
        self.text_embedder = Embedder(text_dim, dim, None, rngs=rngs)

    def time(self, timestep: Float[Array, "b rows"], dtype) -> tuple[Array, Array]:
        """The embedding [b, rows, d], computed in float32, and its projection to six modulations [b, rows, 6, d]."""
        b, rows = timestep.shape
        x = timestep_features(timestep.reshape(-1), self.freq_dim)
        x = self.time_embedder.linear_2(jax.nn.silu(self.time_embedder.linear_1(x))).astype(dtype)
        projected = self.time_proj(jax.nn.silu(x))
        return x.reshape(b, rows, -1), projected.reshape(b, rows, 6, -1)

    def text(self, embeddings: Float[Array, "b m text_dim"]) -> Float[Array, "b m d"]:
        return self.text_embedder.linear_2(jax.nn.gelu(self.text_embedder.linear_1(embeddings), approximate=True))
