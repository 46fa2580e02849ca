"""The discriminator: heads that tell real latents from generated ones by the critic's features (paper section 3.5)."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from helios_jax.models.layers import Conv, Linear, ones, param, zeros

GROUPS = 32  # of the group norms
# Deviation 1 / sqrt(3 inputs), torch's default and so upstream's: Adam's steps are large or small beside it.
WEIGHTS = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


@dataclass(unsafe_hash=True)
class DiscriminatorConfig:
    """One head sees the noisy tokens after each of the critic's `blocks` (numbers from 0) and, with `output`, one more
    the velocity. `dim` is the heads' width (upstream's gan_hooks, is_use_gan_final, gan_cond_map_dim)."""

    blocks: tuple[int, ...] = (5, 15, 25, 35)
    output: bool = True
    dim: int = 768

    def __post_init__(self) -> None:
        self.blocks = tuple(self.blocks)
        if not self.blocks and not self.output:
            raise ValueError("a discriminator needs a head: name blocks, or set output")
        if min(self.blocks, default=0) < 0:
            raise ValueError(f"blocks are numbers from 0, got {self.blocks}")
        if self.dim < 1 or self.dim % GROUPS:
            raise ValueError(f"dim must be a multiple of {GROUPS} (the groups of its norms), got {self.dim}")


class GroupNorm(nnx.Module):
    """Normalises each of 32 groups of channels over a sample's frames and pixels, in float32."""

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        self.weight = param(rngs, ones, (features,), (None,))
        self.bias = param(rngs, zeros, (features,), (None,))

    def __call__(self, x: Float[Array, "b t h w d"]) -> Float[Array, "b t h w d"]:
        grouped = x.astype(jnp.float32).reshape(*x.shape[:4], GROUPS, -1)
        axes = (1, 2, 3, 5)
        grouped = grouped - grouped.mean(axes, keepdims=True)
        grouped = grouped * jax.lax.rsqrt(jnp.square(grouped).mean(axes, keepdims=True) + 1e-5)
        y = grouped.reshape(x.shape) * self.weight[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)


class HeadConv(Conv):
    """A convolution that is a matrix product on CPUs: there, XLA computes the gradients of convolutions inside a
    `lax.cond`, such as a player's turn, on one thread and without blocking: 25 times as long."""

    def convolve(self, x: Float[Array, "batch *space in"], kernel: Array) -> Float[Array, "batch *out_space out"]:
        """The convolution without its bias."""
        return jax.lax.platform_dependent(x, kernel, cpu=self._multiply, default=super().convolve)

    def _multiply(self, x: Array, kernel: Array) -> Array:
        """The product of the kernel as a matrix and the patches that it sees."""
        x = jnp.pad(x, [(0, 0), *self.padding, (0, 0)])
        for axis, (size, stride) in reversed(list(enumerate(zip(kernel.shape, self.stride, strict=False), 1))):
            last = x.shape[axis] - size
            shifted = [jax.lax.slice_in_dim(x, i, last + i + 1, stride, axis) for i in range(size)]
            x = jnp.concatenate(shifted, -1)
        return x @ kernel.reshape(-1, kernel.shape[-1])


class Head(nnx.Module):
    """Six convolutions, each with group norm and SiLU, a mean over frames and pixels, and a linear layer to one logit
    (upstream's Discriminator3DHead)."""

    # Kernel, stride and padding of each convolution, in time, height and width.
    SHAPES: ClassVar = (
        ((3, 3, 3), (1, 1, 1), (1, 1, 1)),
        ((4, 4, 4), (2, 2, 2), (1, 1, 1)),
        ((4, 4, 4), (2, 2, 2), (1, 1, 1)),
        ((3, 3, 3), (2, 1, 1), (1, 1, 1)),
        ((3, 3, 3), (2, 1, 1), (1, 1, 1)),
        ((1, 3, 3), (1, 1, 1), (0, 1, 1)),
    )

    def __init__(self, in_features: int, dim: int, *, rngs: nnx.Rngs):
        def conv(i: int) -> HeadConv:
            kernel, stride, padding = self.SHAPES[i]
            sides = [(p, p) for p in padding]
            size = dim if i else in_features
            axes = ("embed", "mlp")
            return HeadConv(size, dim, kernel, stride=stride, padding=sides, axes=axes, init=WEIGHTS, rngs=rngs)

        self.convs = nnx.List([conv(i) for i in range(len(self.SHAPES))])
        self.norms = nnx.List([GroupNorm(dim, rngs=rngs) for _ in self.SHAPES])
        self.out = Linear(dim, 1, axes=("embed", None), init=WEIGHTS, rngs=rngs)

    def __call__(self, x: Float[Array, "b t h w d"]) -> Float[Array, " b"]:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = jax.nn.silu(norm(conv(x)))
        return self.out(x.mean((1, 2, 3)))[:, 0].astype(jnp.float32)

    @classmethod
    def smallest(cls, axis: int) -> int:
        """Shortest input along time, height or width (0 to 2) that leaves an output."""
        size = 1
        for kernel, stride, padding in reversed(cls.SHAPES):
            size = max(1, (size - 1) * stride[axis] + kernel[axis] - 2 * padding[axis])
        return size


class Discriminator(nnx.Module):
    """A head for the velocity and one for each chosen block."""

    def __init__(self, config: DiscriminatorConfig, width: int, channels: int, *, rngs: nnx.Rngs):
        """`width` is the number of features of the critic's tokens, `channels` that of its velocity."""
        self.config = config
        self.output = Head(channels, config.dim, rngs=rngs) if config.output else None
        self.blocks = nnx.List([Head(width, config.dim, rngs=rngs) for _ in config.blocks])

    def __call__(
        self, velocity: Float[Array, "b t h w c"], hidden: tuple[Float[Array, "b _t _h _w d"], ...]
    ) -> Float[Array, "b heads"]:
        """Logits, low for real latents (upstream's sign)."""
        heads = [] if self.output is None else [self.output(velocity)]
        heads += [head(x) for head, x in zip(self.blocks, hidden, strict=True)]
        return jnp.stack(heads, 1)
