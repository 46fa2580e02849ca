"""Queries and keys before attention: RMS norm across all heads, rotary position embedding, split into heads.

XLA takes two passes for the norm and the rotation. On TPUs it takes four more to change to the layout that attention
reads. The kernel reads and writes once.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.core import device, rows, tiles
from pallas_kernels.core.dispatch import Implementation, by_kernel
from pallas_kernels.norm_rope import gpu as norm_rope_gpu
from pallas_kernels.norm_rope import tpu as norm_rope_tpu

# cos and sin of the angle of each pair of features; the first dimension is 1 when all samples share positions.
Rotary = tuple[Float[Array, "#b n pairs"], Float[Array, "#b n pairs"]]
Turn = Callable[[Array, Rotary], Array]


def reference(
    x: Float[Array, "b n d"],
    weight: Float[Array, " d"],
    heads: int,
    eps: float,
    table: Rotary | None = None,
    history_scale: Float[Array, " #heads"] | None = None,
    num_history: int = 0,
    turn: Turn | None = None,
) -> Float[Array, "b n heads head_dim"]:
    """x / sqrt(mean(x^2) + eps) * weight over all features, in float32; split into heads, whose neighbouring pairs
    (0, 1), (2, 3), ... are turned by the angles of `table` (by `turn`, or `turn_pairs`); the first `num_history` tokens
    times `history_scale`.

    Between these steps the dtype is that of `x`, as if each step were a layer of its own.
    """
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)
    y = (y * weight.astype(jnp.float32)).astype(x.dtype).reshape(*x.shape[:2], heads, -1)
    if table is not None:
        y = (turn or turn_pairs)(y, table)
    if history_scale is None or num_history == 0:
        return y
    history = (jnp.arange(y.shape[1]) < num_history)[None, :, None, None]
    return jnp.where(history, y * history_scale[:, None], y).astype(x.dtype)


def turn_pairs(y: Float[Array, "b n heads head_dim"], table: Rotary) -> Float[Array, "b n heads head_dim"]:
    """Turns neighbouring pairs of features, in float32."""
    cos, sin = (t[:, :, None] for t in table)
    pairs = y.astype(jnp.float32).reshape(*y.shape[:-1], -1, 2)
    real, imaginary = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], -1)
    return turned.reshape(y.shape).astype(y.dtype)


@jax.custom_vjp
def turn_heads(y: Float[Array, "b n heads head_dim"], table: Rotary) -> Float[Array, "b n heads head_dim"]:
    """`turn_pairs`, whose gradient keeps heads whole: arrays of pairs have a last dimension of 2, which a TPU pads to
    128 and copies to turn.
    """
    return turn_pairs(y, table)


def _turn_back(kept: tuple[Array, Rotary], gradient: Array) -> tuple[Array, Rotary]:
    y, table = kept
    cos, sin = (t[:, :, None] for t in signed(table))
    exchanged = _exchanged(gradient).astype(jnp.float32)
    back = (gradient.astype(jnp.float32) * cos - exchanged * sin).astype(y.dtype)
    _, of_table = jax.vjp(lambda table: turn_pairs(y, table), table)
    return back, of_table(gradient)[0]


turn_heads.defvjp(lambda y, table: (turn_pairs(y, table), (y, table)), _turn_back)


def _exchanged(x: Float[Array, "b n heads head_dim"]) -> Float[Array, "b n heads head_dim"]:
    """The two features of each pair exchanged, by a product with a permutation: exact, and free beside its reads."""
    features = jnp.arange(x.shape[-1])
    permutation = (features[:, None] == (features ^ 1)).astype(x.dtype)
    return jnp.einsum("bnhd,de->bnhe", x, permutation, precision="highest")


def unsupported(x: Array | jax.ShapeDtypeStruct, heads: int) -> str | None:
    """The reason why the kernel cannot run here for these features, or None."""
    head_dim = x.shape[-1] // heads
    if reason := rows.unsupported("norm_rope", x, x.shape[-1]):
        return reason
    if head_dim not in (64, 128):
        return f"Pallas norm_rope has kernels for head_dim 64 and 128, not {head_dim}"
    if device.platform() == "gpu" and heads % norm_rope_gpu.WARPS:
        return f"Pallas norm_rope on a GPU is for heads in multiples of {norm_rope_gpu.WARPS}, not {heads}"
    return None


def norm_rope(
    x: Float[Array, "b n d"],
    weight: Float[Array, " d"],
    heads: int,
    eps: float,
    table: Rotary | None = None,
    history_scale: Float[Array, " #heads"] | None = None,
    num_history: int = 0,
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "b n heads head_dim"]:
    """`reference`. The kernels round once, at the end. The gradient is a kernel's on TPUs, for heads of 128 features,
    and the reference's by XLA elsewhere.

    Without `implementation` the kernel runs if it can and saves memory traffic, which on a GPU requires a `table`;
    else XLA. Raises ValueError if "pallas" is asked for and cannot run.
    """
    pays = table is not None or device.platform() == "tpu"
    if not by_kernel(implementation, unsupported(x, heads), default=pays):
        return reference(x, weight, heads, eps, table, history_scale, num_history)
    kernel = norm_rope_tpu if device.platform() == "tpu" else norm_rope_gpu
    forward = partial(kernel.forward, sizes=tiles.lookup("norm_rope", device.kind(), x.shape[1]))
    backward = None
    if device.platform() == "tpu" and x.shape[2] == heads * rows.LANES:
        backward = partial(norm_rope_tpu.backward, sizes=tiles.lookup("norm_rope_backward", device.kind(), x.shape[1]))
    return from_kernels(forward, x, weight, heads, eps, table, history_scale, num_history, backward=backward)


def from_kernels(
    forward, x: Array, weight: Array, heads: int, eps: float, table: Rotary | None, history_scale: Array | None,
    num_history: int, backward: Any = None,
) -> Array:  # fmt: skip
    """`norm_rope` by `forward` of `norm_rope_tpu` or `norm_rope_gpu`, with its block sizes; its gradient by `backward`
    of `norm_rope_tpu`, or by XLA.
    """
    runs: rows.Runs = (x.shape[1],)
    if history_scale is not None and num_history:
        runs = (num_history, x.shape[1] - num_history) if num_history < x.shape[1] else (num_history,)

    def rows_of_weights(weight: Array, history_scale: Array | None) -> Float[Array, "runs d"]:
        """A row for each run: the rotation is linear, so a head's factor can be part of its weights."""
        row = weight.astype(jnp.float32)[None]
        if history_scale is None or not num_history:
            return row
        scale = jnp.broadcast_to(history_scale.astype(jnp.float32), (heads,))
        scaled = row * jnp.repeat(scale, x.shape[2] // heads)
        return jnp.concatenate([scaled, row]) if len(runs) > 1 else scaled

    @jax.custom_vjp
    def run(x: Array, weight: Array, table: Rotary | None, history_scale: Array | None) -> Array:
        return forward(x, rows_of_weights(weight, history_scale), heads, eps, table and signed(table), runs)

    def keep(*inputs):
        return run(*inputs), inputs

    def plain(x, weight, table, history_scale):
        return reference(x, weight, heads, eps, table, history_scale, num_history, turn_heads)

    def gradients_by_xla(inputs, gradient):
        return jax.vjp(plain, *inputs)[1](gradient)

    def gradients_by_kernel(inputs, gradient):
        x, weight, table, history_scale = inputs
        of_rows, back = jax.vjp(rows_of_weights, weight, history_scale)
        dx, drows = backward(x, of_rows, gradient, eps, table and signed(table), runs)
        dweight, dscale = back(drows)
        # Angles are not learnt: XLA drops their gradient unless something uses it.
        _, of_table = jax.vjp(lambda table: plain(x, weight, table, history_scale), table)
        return dx, dweight, *of_table(gradient), dscale

    run.defvjp(keep, gradients_by_xla if backward is None else gradients_by_kernel)
    return run(x, weight, table, history_scale)


def signed(table: Rotary) -> Rotary:
    """cos and sin [#b, n, head_dim], signed so that the rotation is y * cos + (y with each pair exchanged) * sin."""
    cos, sin = (jnp.repeat(t.astype(jnp.float32), 2, -1) for t in table)
    return cos, sin * jnp.where(jnp.arange(sin.shape[-1]) % 2, 1.0, -1.0)
