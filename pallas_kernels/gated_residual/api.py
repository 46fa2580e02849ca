"""A gated residual and the norm that follows it: x + gate * y, then normed, shifted and scaled.

The kernel pays on GPUs after self-attention, where cross-attention takes the norm of the noisy tokens' sum. XLA writes
the sum and reads it again: 88 MB of 516 per block at 11040 tokens of 5120 features in bfloat16. Elsewhere XLA fuses the
addition into the matrix product before it, which is better: after cross-attention on GPUs, and everywhere on TPUs. A
sum without a norm directly after it (the block's end) is one pass in XLA and needs no kernel.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import adaln
from pallas_kernels.adaln import gpu as adaln_gpu
from pallas_kernels.adaln import tpu as adaln_tpu
from pallas_kernels.core import device, rows, tiles
from pallas_kernels.core.dispatch import Implementation, by_kernel
from pallas_kernels.core.rows import Runs
from pallas_kernels.gated_residual import gpu as gated_residual_gpu
from pallas_kernels.gated_residual import tpu as gated_residual_tpu

# The sum, and its shifted and scaled norm.
Sums = tuple[Float[Array, "b m d"], Float[Array, "b m d"]]


def reference(
    x: Float[Array, "b n d"],
    y: Float[Array, "b n d"],
    gate: Float[Array, "#b runs d"],
    shift: Float[Array, "#b runs d"],
    gain: Float[Array, "#b runs d"],
    runs: Runs,
    eps: float,
) -> Sums:
    """z = x + gate * y of the last sum(runs) tokens, in float32, cast to the dtype of `x`; and layer_norm(z) * gain +
    shift.

    `gate`, `shift` and `gain` have one row for each of `runs`, which are numbers of tokens.
    """
    first = x.shape[1] - sum(runs)
    gated = y[:, first:].astype(jnp.float32) * rows.spread(gate, runs)
    z = (x[:, first:].astype(jnp.float32) + gated).astype(x.dtype)
    norm = adaln.layer_norm(z, eps) * rows.spread(gain, runs) + rows.spread(shift, runs)
    return z, norm.astype(x.dtype)


def unsupported(x: Float[Array, "b n d"], first: int) -> str | None:
    """The reason why the kernel cannot run here for the tokens from `first` on, or None."""
    if device.platform() == "tpu" and first % gated_residual_tpu.TILE:
        tile = gated_residual_tpu.TILE
        return f"Pallas gated_residual on a TPU is for a first token that is a multiple of {tile}, not {first}"
    return rows.unsupported("gated_residual", x, x.shape[-1])


def gated_residual(
    x: Float[Array, "b n d"],
    y: Float[Array, "b n d"],
    gate: Float[Array, "#b runs d"],
    shift: Float[Array, "#b runs d"],
    gain: Float[Array, "#b runs d"],
    runs: Runs,
    eps: float,
    *,
    implementation: Implementation | None = None,
) -> Sums:
    """`reference`, which reads the last sum(runs) tokens in place.

    Without `implementation` the kernel runs on GPUs if it can, else XLA. Raises ValueError if "pallas" is asked for
    and cannot run, and if `runs` or the tables do not fit the tokens.
    """
    first = x.shape[1] - sum(runs)
    if first < 0:
        raise ValueError(f"gated_residual: runs {runs} have the sum {sum(runs)}, and there are {x.shape[1]} tokens")
    rows.check("gated_residual", x[:, first:], runs, gate, shift, gain)
    if not by_kernel(implementation, unsupported(x, first), default=device.platform() == "gpu"):
        return reference(x, y, gate, shift, gain, runs, eps)
    tpu, sizes = device.platform() == "tpu", tiles.lookup("gated_residual", device.kind(), x.shape[1])
    forward = partial((gated_residual_tpu if tpu else gated_residual_gpu).forward, sizes=sizes)
    norm_sizes = tiles.lookup("adaln_backward", device.kind(), x.shape[1])
    norm_backward = partial((adaln_tpu if tpu else adaln_gpu).backward, sizes=norm_sizes)
    return from_kernels(forward, norm_backward, x, y, gate, shift, gain, runs, eps)


def from_kernels(
    forward: Any, norm_backward: Any, x: Array, y: Array, gate: Array, shift: Array, gain: Array, runs: Runs,
    eps: float,
) -> Sums:  # fmt: skip
    """`gated_residual` by `forward` of `gated_residual_tpu` or `gated_residual_gpu`, with its block sizes.

    The gradient of the norm is adaLN's kernel `norm_backward`; the gradient of the gated sum is XLA's.
    """
    first = x.shape[1] - sum(runs)

    @jax.custom_vjp
    def run(*inputs: Array) -> Sums:
        return forward(*inputs, runs, eps)

    def keep(*inputs):
        z, normed = run(*inputs)
        return (z, normed), (inputs, z)

    def backward(kept, gradients):
        (x, y, gate, shift, gain), z = kept
        dz, dshift, dgain = norm_backward(z, gain - 1, gradients[1], runs, eps)

        def add(x, y, gate):  # the sum alone
            return x[:, first:].astype(jnp.float32) + y[:, first:].astype(jnp.float32) * rows.spread(gate, runs)

        total = gradients[0].astype(jnp.float32) + dz.astype(jnp.float32)
        dx, dy, dgate = jax.vjp(add, x, y, gate)[1](total)
        return dx, dy, dgate, rows.as_given(dshift, shift), rows.as_given(dgain, gain)

    run.defvjp(keep, backward)
    return run(x, y, gate, shift, gain)
