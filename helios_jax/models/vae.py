"""The Wan 2.1 video autoencoder: causal in time, 4x in time and 8x8 in space, a whole chunk at once.

Upstream runs it frame by frame and keeps the last two frames of every convolution's input. Zeros before the first frame
give the same numbers, so nothing here loops over frames. Two layers of that loop treat the first frame apart, and so
do `Downsample` and `Upsample`: it is neither halved nor doubled in time, which is why 1 + 4k frames are 1 + k latents.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx
from jaxtyping import Array, Float

from helios_jax.models.layers import Conv, ones, param

WHOLE = (None, None)  # axes of every weight: the 127M parameters are replicated on all devices


@dataclass(unsafe_hash=True)
class VAEConfig:
    """The architecture, in the names of diffusers' `AutoencoderKLWan`; the defaults are Wan 2.1, which Helios uses."""

    CLASS_NAME: ClassVar[str] = "AutoencoderKLWan"
    WEIGHTS_NAME: ClassVar[str] = "diffusion_pytorch_model.safetensors"

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: tuple[float, ...] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    dropout: float = 0.0
    # fmt: off
    latents_mean: tuple[float, ...] = (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    )
    latents_std: tuple[float, ...] = (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    )
    # fmt: on
    is_residual: bool = False
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None
    scale_factor_temporal: int = 0  # pixel frames to a latent one; 0: what temperal_downsample gives
    scale_factor_spatial: int = 0  # pixels to a latent one, along a side; 0: what dim_mult gives

    def __post_init__(self) -> None:
        for name in ("dim_mult", "attn_scales", "temperal_downsample", "latents_mean", "latents_std"):
            setattr(self, name, tuple(getattr(self, name)))
        temporal, spatial = 2 ** sum(self.temperal_downsample), 2 ** (len(self.dim_mult) - 1)
        self.scale_factor_temporal = self.scale_factor_temporal or temporal
        self.scale_factor_spatial = self.scale_factor_spatial or spatial

        def require(ok: bool, field: str, rule: str) -> None:
            if not ok:
                raise ValueError(f"{field} is {getattr(self, field)!r}: {rule}")

        wan22 = "that is the Wan 2.2 autoencoder; Helios was trained on Wan 2.1's, whose value is"
        require(not self.is_residual, "is_residual", f"{wan22} false")
        require(self.patch_size is None, "patch_size", f"{wan22} null")
        require(self.dropout == 0, "dropout", "this network has no dropout; set it to 0")
        require(not self.attn_scales, "attn_scales", "diffusers cannot run these attentions either; set it to []")
        levels = len(self.dim_mult) - 1
        require(len(self.temperal_downsample) == levels, "temperal_downsample", f"dim_mult needs {levels} entries")
        require(
            self.scale_factor_temporal == temporal, "scale_factor_temporal", f"temperal_downsample gives {temporal}"
        )
        require(self.scale_factor_spatial == spatial, "scale_factor_spatial", f"dim_mult gives {spatial}")
        for name in ("latents_mean", "latents_std"):
            require(len(getattr(self, name)) == self.z_dim, name, f"z_dim needs {self.z_dim} values")
        require(min(self.latents_std) > 0, "latents_std", "every value must be positive")


def normalize(latents: Float[Array, "b t h w c"], config: VAEConfig) -> Float[Array, "b t h w c"]:
    """Latents as the transformer takes them: zero mean and unit variance per channel over Wan's training set."""
    mean, std = jnp.asarray(config.latents_mean), jnp.asarray(config.latents_std)
    return ((latents.astype(jnp.float32) - mean) / std).astype(latents.dtype)


def denormalize(latents: Float[Array, "b t h w c"], config: VAEConfig) -> Float[Array, "b t h w c"]:
    """The inverse of `normalize`, for `AutoencoderKLWan.decode`."""
    mean, std = jnp.asarray(config.latents_mean), jnp.asarray(config.latents_std)
    return (latents.astype(jnp.float32) * std + mean).astype(latents.dtype)


def _conv3d(x: jax.Array, weight: jax.Array, stride: int) -> jax.Array:
    """3-D convolution with "same" padding in space and none in time; `stride` is in time."""
    padding = [(0, 0)] + [(k // 2, k // 2) for k in weight.shape[1:3]]
    return jax.lax.conv_general_dilated(
        x, weight, (stride, 1, 1), padding, dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )


def _conv3d_as_2d(x: jax.Array, weight: jax.Array, stride: int) -> jax.Array:
    """`_conv3d` with time folded into the batch and the taps in time laid side by side as channels."""
    taps, *kernel, _, _ = weight.shape
    span = x.shape[1] - taps + 1
    x = jnp.concatenate([x[:, i : i + span : stride] for i in range(taps)], -1)
    y = jax.lax.conv_general_dilated(
        rearrange(x, "b t h w c -> (b t) h w c"),
        rearrange(weight, "t h w i o -> h w (t i) o"),
        (1, 1),
        [(k // 2, k // 2) for k in kernel],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return rearrange(y, "(b t) h w c -> b t h w c", b=x.shape[0])


class CausalConv(Conv):
    """Convolution over time, height and width that sees no later frames; zeros are padded before frame 0.

    Without `causal`, time is not padded: every output needs all the frames under its kernel.
    """

    def __init__(
        self, dim: int, out_dim: int, kernel: tuple[int, int, int] = (3, 3, 3), stride: int = 1, *, causal: bool = True,
        rngs: nnx.Rngs,
    ):  # fmt: skip
        super().__init__(dim, out_dim, kernel, stride=(stride, 1, 1), axes=WHOLE, rngs=rngs)
        self.causal = causal

    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t_out h w c_out"]:
        weight, stride = self.weight[...].astype(x.dtype), self.stride[0]
        taps = weight.shape[0]
        if self.causal and taps > 1:
            # A concatenation: cuDNN takes symmetric padding only, and XLA would pad space in the same copy again.
            zeros = jnp.zeros((x.shape[0], taps - 1, *x.shape[2:]), x.dtype)
            x = jnp.concatenate([zeros, x], 1)
        # XLA's 3-D convolution is slow on a CPU: 3x3x3 with 3 to 32 channels takes 3 to 14 times as long forward and 3
        # to 7 times as long with gradients as one 2-D convolution over the channels of three frames, which also beats
        # the sum of three 2-D ones. GPUs and TPUs have a fast one. The branch is chosen when the program is lowered, so
        # that cross-compilation for another platform works.
        y = jax.lax.platform_dependent(
            x,
            weight,
            cpu=lambda x, w: _conv3d_as_2d(x, w, stride),
            default=lambda x, w: _conv3d(x, w, stride),
        )
        return y + self.bias[...].astype(x.dtype)


class ChannelNorm(nnx.Module):
    """x / |x| * sqrt(c) * gamma over the channels, in float32, returned in the input's dtype (WanRMS_norm)."""

    def __init__(self, dim: int, *, ones_after: int = 3, rngs: nnx.Rngs):
        self.gamma = param(rngs, ones, (dim,), (None,), (dim, *[1] * ones_after))

    def __call__(self, x: Float[Array, "*batch c"]) -> Float[Array, "*batch c"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.maximum(jnp.square(y).sum(-1, keepdims=True), 1e-24)) * x.shape[-1] ** 0.5
        return (y * self.gamma[...].astype(jnp.float32)).astype(x.dtype)


class ResidualBlock(nnx.Module):
    """Twice norm, SiLU, convolution; plus the input, projected where the width changes (WanResidualBlock)."""

    def __init__(self, dim: int, out_dim: int, *, rngs: nnx.Rngs):
        self.norm1 = ChannelNorm(dim, rngs=rngs)
        self.conv1 = CausalConv(dim, out_dim, rngs=rngs)
        self.norm2 = ChannelNorm(out_dim, rngs=rngs)
        self.conv2 = CausalConv(out_dim, out_dim, rngs=rngs)
        self.conv_shortcut = CausalConv(dim, out_dim, (1, 1, 1), rngs=rngs) if dim != out_dim else None

    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c_out"]:
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class AttentionBlock(nnx.Module):
    """One-headed attention among the positions of each frame, plus the input (WanAttentionBlock)."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.norm = ChannelNorm(dim, ones_after=2, rngs=rngs)
        self.to_qkv = Conv(dim, 3 * dim, (1, 1), axes=WHOLE, rngs=rngs)
        self.proj = Conv(dim, dim, (1, 1), axes=WHOLE, rngs=rngs)

    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
        b, _, h, _, _ = x.shape
        y = self.to_qkv(rearrange(self.norm(x), "b t h w c -> (b t) h w c"))
        q, k, v = rearrange(y, "b h w (three d) -> three b (h w) 1 d", three=3)
        y = jax.nn.dot_product_attention(q, k, v, implementation="xla")  # cuDNN has no heads as wide as these 384
        y = self.proj(rearrange(y, "b (h w) 1 d -> b h w d", h=h))
        return x + rearrange(y, "(b t) h w c -> b t h w c", b=b)


class MidBlock(nnx.Module):
    """Residual block, attention, residual block (WanMidBlock)."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.resnets = nnx.List([ResidualBlock(dim, dim, rngs=rngs) for _ in range(2)])
        self.attentions = nnx.List([AttentionBlock(dim, rngs=rngs)])

    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Downsample(nnx.Module):
    """Halves height and width and, with `time`, the number of frames after the first (WanResample, downsample)."""

    def __init__(self, dim: int, *, time: bool, rngs: nnx.Rngs):
        self.resample = Conv(dim, dim, (3, 3), stride=(2, 2), padding=((0, 1), (0, 1)), axes=WHOLE, rngs=rngs)
        self.time_conv = CausalConv(dim, dim, (3, 1, 1), 2, causal=False, rngs=rngs) if time else None

    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t_out h_out w_out c"]:
        y = self.resample(rearrange(x, "b t h w c -> (b t) h w c"))
        y = rearrange(y, "(b t) h w c -> b t h w c", b=x.shape[0])
        if self.time_conv is None or y.shape[1] == 1:
            return y
        return jnp.concatenate([y[:, :1], self.time_conv(y)], 1)


class Upsample(nnx.Module):
    """Doubles height and width, halves the channels and, with `time`, doubles the number of frames after the first.

    As in WanResample (upsample), the later frames are computed as if the first one did not exist.
    """

    def __init__(self, dim: int, *, time: bool, rngs: nnx.Rngs):
        self.resample = Conv(dim, dim // 2, (3, 3), padding=((1, 1), (1, 1)), axes=WHOLE, rngs=rngs)
        self.time_conv = CausalConv(dim, 2 * dim, (3, 1, 1), rngs=rngs) if time else None

    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t_out h_out w_out c_out"]:
        if self.time_conv is not None and x.shape[1] > 1:
            pairs = rearrange(self.time_conv(x[:, 1:]), "b t h w (two c) -> b (t two) h w c", two=2)
            x = jnp.concatenate([x[:, :1], pairs], 1)
        y = self.resample(repeat(x, "b t h w c -> (b t) (h two) (w too) c", two=2, too=2))
        return rearrange(y, "(b t) h w c -> b t h w c", b=x.shape[0])


class Encoder(nnx.Module):
    """Video to the mean and log-variance of its latents, before the last 1x1 convolution (WanEncoder3d)."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        dim = config.base_dim
        self.conv_in = CausalConv(config.in_channels, dim, rngs=rngs)
        # One flat list, as upstream numbers it.
        blocks: list[ResidualBlock | Downsample] = []
        for level, mult in enumerate(config.dim_mult):
            for _ in range(config.num_res_blocks):
                blocks.append(ResidualBlock(dim, mult * config.base_dim, rngs=rngs))
                dim = mult * config.base_dim
            if level < len(config.temperal_downsample):
                blocks.append(Downsample(dim, time=config.temperal_downsample[level], rngs=rngs))
        self.down_blocks = nnx.List(blocks)
        self.mid_block = MidBlock(dim, rngs=rngs)
        self.norm_out = ChannelNorm(dim, rngs=rngs)
        self.conv_out = CausalConv(dim, 2 * config.z_dim, rngs=rngs)

    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t_out h_out w_out z"]:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.norm_out(self.mid_block(x))))


class UpBlock(nnx.Module):
    """Residual blocks, then an `Upsample` unless it is the last level's (WanUpBlock); `time` None: the last level."""

    def __init__(self, dim: int, out_dim: int, num_res_blocks: int, time: bool | None, *, rngs: nnx.Rngs):
        widths = [dim] + [out_dim] * num_res_blocks
        self.resnets = nnx.List([ResidualBlock(width, out_dim, rngs=rngs) for width in widths])
        self.upsamplers = nnx.List([] if time is None else [Upsample(out_dim, time=time, rngs=rngs)])

    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t_out h_out w_out c_out"]:
        for block in (*self.resnets, *self.upsamplers):
            x = block(x)
        return x


class Decoder(nnx.Module):
    """Latents, after the first 1x1 convolution, to video (WanDecoder3d)."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        widths = [(config.decoder_base_dim or config.base_dim) * mult for mult in reversed(config.dim_mult)]
        self.conv_in = CausalConv(config.z_dim, widths[0], rngs=rngs)
        self.mid_block = MidBlock(widths[0], rngs=rngs)
        ins = [widths[0]] + [width // 2 for width in widths[:-1]]  # an Upsample halves the channels
        times = [*reversed(config.temperal_downsample), None]
        blocks = config.num_res_blocks
        self.up_blocks = nnx.List(
            [UpBlock(dim, width, blocks, time, rngs=rngs) for dim, width, time in zip(ins, widths, times)]
        )
        self.norm_out = ChannelNorm(widths[-1], rngs=rngs)
        self.conv_out = CausalConv(widths[-1], config.out_channels, rngs=rngs)

    def __call__(self, x: Float[Array, "b t h w z"]) -> Float[Array, "b t_out h_out w_out c"]:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class AutoencoderKLWan(nnx.Module):
    """The variational autoencoder of Wan 2.1 (diffusers' `AutoencoderKLWan`)."""

    FILE_NAMES = (("resample", "resample.1"),)

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.quant_conv = CausalConv(2 * config.z_dim, 2 * config.z_dim, (1, 1, 1), rngs=rngs)
        self.post_quant_conv = CausalConv(config.z_dim, config.z_dim, (1, 1, 1), rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)

    def encode(
        self, video: Float[Array, "b t h w c"]
    ) -> tuple[Float[Array, "b t_z h_z w_z z"], Float[Array, "b t_z h_z w_z z"]]:
        """Mean and log-variance (within [-30, 20]) of the latents of `video`, whose values are in [-1, 1].

        With Wan 2.1's factors [b, 1 + 4k, 8h, 8w, 3] becomes twice [b, 1 + k, h, w, 16]; not normalized yet.

        Raises:
            ValueError: the number of frames is not 1 + 4k, or height or width is not a multiple of 8.
        """
        time, space = self.config.scale_factor_temporal, self.config.scale_factor_spatial
        _, t, h, w, _ = video.shape
        if t % time != 1 % time:
            raise ValueError(
                f"{t} frames: the autoencoder takes 1 + {time}k; {max(t - 1, 0) // time * time + 1} would do"
            )
        if h % space or w % space:
            raise ValueError(f"{h} x {w} pixels: the autoencoder takes height and width in multiples of {space}")
        mean, logvar = jnp.split(self.quant_conv(self.encoder(video)), 2, -1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, latents: Float[Array, "b t_z h_z w_z z"]) -> Float[Array, "b t h w c"]:
        """The video of `latents` (denormalized), its values in [-1, 1]: 1 + k latent frames give 1 + 4k frames."""
        return jnp.clip(self.decode_unclipped(latents), -1.0, 1.0)

    def decode_unclipped(self, latents: Float[Array, "b t_z h_z w_z z"]) -> Float[Array, "b t h w c"]:
        """`decode` for training: values outside [-1, 1] stay, because their gradient would be lost with them."""
        return self.decoder(self.post_quant_conv(latents))
