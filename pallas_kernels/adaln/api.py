"""Layer norm with a shift and a scale chosen by each token's run (adaLN): values and gradients.

Values: on an H100, XLA reads and writes once, as the kernel does. On TPUs, XLA reads three times, but does not write
if a product follows, so the same number of bytes moves. Gradients: XLA moves 904 MB on a TPU and 1477 MB on an H100;
the kernel moves 339 MB (11040 tokens of 5120 features in bfloat16, as compiled).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.adaln import gpu as adaln_gpu
from pallas_kernels.adaln import tpu as adaln_tpu
from pallas_kernels.core import device, rows, tiles
from pallas_kernels.core.dispatch import Implementation, by_kernel
from pallas_kernels.core.rows import Runs


def reference(
    x: Float[Array, "b n d"], shift: Float[Array, "#b runs d"], scale: Float[Array, "#b runs d"], runs: Runs, eps: float
) -> Float[Array, "b n d"]:
    """(x - mean) / sqrt(var + eps) * (1 + scale) + shift in float32, cast to the dtype of `x`.

    `runs` are numbers of tokens: the first `runs[0]` tokens take row 0 of `shift` and `scale`, and so on.
    """
    return (layer_norm(x, eps) * (1 + rows.spread(scale, runs)) + rows.spread(shift, runs)).astype(x.dtype)


def layer_norm(x: Float[Array, "*batch d"], eps: float) -> Float[Array, "*batch d"]:
    """(x - mean) / sqrt(var + eps) over the last dimension, computed and returned in float32."""
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps)


def unsupported(x: Array) -> str | None:
    """The reason why the kernel cannot run here for these tokens, or None."""
    return rows.unsupported("adaLN", x, x.shape[-1])


def adaln(
    x: Float[Array, "b n d"],
    shift: Float[Array, "#b runs d"],
    scale: Float[Array, "#b runs d"],
    runs: Runs,
    eps: float,
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "b n d"]:
    """`reference` by a chosen implementation.

    Without `implementation`, XLA computes the values, and the kernel the gradients where it can run. Raises ValueError
    if "pallas" is asked for (values and gradients) and cannot run, and if `runs` do not add up to the tokens.
    """
    rows.check("adaLN", x, runs, shift, scale)
    if not by_kernel(implementation, unsupported(x), default=True):
        return reference(x, shift, scale, runs, eps)
    kernel = adaln_tpu if device.platform() == "tpu" else adaln_gpu
    sizes, gradients = (tiles.lookup(op, device.kind(), x.shape[1]) for op in ("adaln", "adaln_backward"))
    forward = reference if implementation is None else partial(kernel.forward, sizes=sizes)
    return from_kernels(forward, partial(kernel.backward, sizes=gradients), x, shift, scale, runs, eps)


def from_kernels(forward: Any, backward: Any, x: Array, shift: Array, scale: Array, runs: Runs, eps: float) -> Array:
    """`adaln` by `forward` and `backward` of `adaln_tpu` or `adaln_gpu`, with their block sizes."""

    @jax.custom_vjp
    def run(x: Array, shift: Array, scale: Array) -> Array:
        return forward(x, shift, scale, runs, eps)

    def keep(*inputs):
        return run(*inputs), inputs

    def gradients(inputs, gradient):
        x, *given = inputs
        dx, *tables = backward(x, given[1], gradient, runs, eps)
        return dx, *(rows.as_given(new, table) for new, table in zip(tables, given))

    run.defvjp(keep, gradients)
    return run(x, shift, scale)
