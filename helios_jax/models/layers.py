"""Layers that every network here is made of.

A parameter is an `nnx.Param` that carries two facts beside its value: `axes`, the logical name of each of its
dimensions (`helios_jax.sharding` maps them to a mesh), and `layout`, how the same values lie in a safetensors file
(`helios_jax.pretrained` reads and writes them). Modules hold parameters only and compute in the dtype of their input;
norms compute in float32. Attribute names are those of diffusers and transformers, so that a parameter's path is its
key in a file.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pallas_kernels.adaln import layer_norm

Initializer = Callable[..., jax.Array]
# "same": as it is; "linear": transposed; "conv": [*kernel, in, out] here, [out, in, *kernel] there;
# a tuple: reshaped to it in the file.
Layout = Literal["same", "linear", "conv"] | tuple[int, ...]

# Checkpoint names of the outputs of linear layers, for rematerialization policies.
LINEAR = "linear"
INNER = "linear_inner"  # queries, keys and features within a feed-forward

zeros = jax.nn.initializers.zeros
ones = jax.nn.initializers.ones
normal = jax.nn.initializers.normal
lecun_normal = jax.nn.initializers.lecun_normal


class Shapes(nnx.Rngs):
    """Passed as `rngs`, it makes a module abstract: the parameters are `jax.ShapeDtypeStruct`s.

    `nnx.eval_shape` gives the same, but traces every initializer, which takes a second for a VAE.
    """


def param(
    rngs: nnx.Rngs, init: Initializer, shape: Sequence[int], axes: Sequence[str | None], layout: Layout = "same"
) -> nnx.Param:
    """A float32 parameter with logical `axes` (one name or None per dimension) and its `layout` in a file."""
    if len(shape) != len(axes):
        raise ValueError(f"a parameter of shape {tuple(shape)} needs {len(shape)} axis names, got {tuple(axes)}")
    if isinstance(rngs, Shapes):
        value = jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
    else:
        value = init(rngs.params(), tuple(shape), jnp.float32)
    return nnx.Param(value, axes=tuple(axes), layout=layout)


Product = Callable[[Array, Array], Array]  # of inputs and a weight [in, out]


def with_adapters(
    y: Array, x: Array, adapters: nnx.List | None, *, first: Product = jnp.matmul, second: Product = jnp.matmul
) -> Array:
    """A layer's output `y` for its input `x`, plus what its low-rank adapters (`helios_jax.lora`) add.

    `first` and `second` compute the products with an adapter's A and B.
    """
    for adapter in adapters or ():
        y = y + adapter(x, first, second)
    return y


def split_product(x: Float[Array, "b n in"], weight: Float[Array, "in out"], heads: int) -> Array:
    """`x @ weight` as [b, n, heads, head_dim], in memory head by head, as attention on a TPU reads it."""
    weight = weight.reshape(x.shape[-1], heads, -1)
    return jnp.einsum("bnd,dhk->bhnk", x, weight).transpose(0, 2, 1, 3)


def joined_product(x: Float[Array, "b n heads head_dim"], weight: Float[Array, "in out"]) -> Float[Array, "b n out"]:
    """`x`, its heads joined, times `weight`; it is read head by head, as attention on a TPU writes it."""
    weight = weight.reshape(*x.shape[2:], -1)
    return jnp.einsum("bhnk,hkd->bnd", x.transpose(0, 2, 1, 3), weight)


class Linear(nnx.Module):
    """`x @ weight + bias`, weight [in, out], plus the `adapters` that `helios_jax.lora` put there.

    `output` is the checkpoint name of its output.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        axes: tuple[str | None, str | None] = ("embed", "embed_out"),
        bias: bool = True,
        output: str = LINEAR,
        init: Initializer = lecun_normal(),  # noqa: B008
        rngs: nnx.Rngs,
    ):
        self.output = output
        self.weight = param(rngs, init, (in_features, out_features), axes, "linear")
        self.bias = param(rngs, zeros, (out_features,), axes[1:]) if bias else None
        self.adapters: nnx.List | None = None

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        y = x @ self.weight[...].astype(x.dtype)
        y = y if self.bias is None else y + self.bias[...].astype(x.dtype)
        return checkpoint_name(with_adapters(y, x, self.adapters), self.output)

    def to_heads(self, x: Float[Array, "b n in"], heads: int) -> Float[Array, "b n heads head_dim"]:
        """The layer's output by `split_product`."""
        product = partial(split_product, heads=heads)
        y = product(x, self.weight[...].astype(x.dtype))
        y = y if self.bias is None else y + self.bias[...].astype(x.dtype).reshape(heads, -1)
        return checkpoint_name(with_adapters(y, x, self.adapters, second=product), self.output)

    def from_heads(self, x: Float[Array, "b n heads head_dim"]) -> Float[Array, "b n out"]:
        """The layer's output by `joined_product`."""
        y = joined_product(x, self.weight[...].astype(x.dtype))
        y = y if self.bias is None else y + self.bias[...].astype(x.dtype)
        return checkpoint_name(with_adapters(y, x, self.adapters, first=joined_product), self.output)


class Conv(nnx.Module):
    """Channels-last convolution over the dimensions between batch and channel; weight [*kernel, in, out]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel: Sequence[int],
        *,
        stride: Sequence[int] | None = None,
        padding: Sequence[tuple[int, int]] | None = None,
        axes: tuple[str | None, str | None] = ("embed", "embed_out"),
        init: Initializer = lecun_normal(),  # noqa: B008
        rngs: nnx.Rngs,
    ):
        self.stride = tuple(stride or [1] * len(kernel))
        self.padding = tuple(padding or [(0, 0)] * len(kernel))
        spatial = (None,) * len(kernel)
        self.weight = param(rngs, init, (*kernel, in_features, out_features), (*spatial, *axes), "conv")
        self.bias = param(rngs, zeros, (out_features,), axes[1:])

    def __call__(self, x: Float[Array, "batch *space in"]) -> Float[Array, "batch *out_space out"]:
        return self.convolve(x, self.weight[...].astype(x.dtype)) + self.bias[...].astype(x.dtype)

    def convolve(self, x: Float[Array, "batch *space in"], kernel: Array) -> Float[Array, "batch *out_space out"]:
        """The convolution without its bias."""
        letters = "DHW"[-len(self.stride) :]
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            self.stride,
            self.padding,
            dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        )


class Embedding(nnx.Module):
    """Rows of `weight` [num, features] by integer id."""

    def __init__(
        self,
        num: int,
        features: int,
        *,
        axes: tuple[str | None, str | None] = ("vocab", "embed"),
        init: Initializer = normal(1.0),  # noqa: B008
        rngs: nnx.Rngs,
    ):
        self.weight = param(rngs, init, (num, features), axes)

    def __call__(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch features"]:
        return self.weight[...][ids]


class LayerNorm(nnx.Module):
    """`layer_norm` with a learned scale and shift, returned in the input's dtype (diffusers' FP32LayerNorm)."""

    def __init__(self, features: int, eps: float, *, rngs: nnx.Rngs):
        self.eps = eps
        self.weight = param(rngs, ones, (features,), ("embed",))
        self.bias = param(rngs, zeros, (features,), ("embed",))

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        y = layer_norm(x, self.eps) * self.weight[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32, returned in the input's dtype."""

    def __init__(self, features: int, eps: float, *, axes: tuple[str | None] = ("embed",), rngs: nnx.Rngs):
        self.eps = eps
        self.weight = param(rngs, ones, (features,), axes)

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return (y * self.weight[...].astype(jnp.float32)).astype(x.dtype)
