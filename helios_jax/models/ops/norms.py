"""Norms fused with the operations around them: kernels of `pallas_kernels` where these pay, and XLA elsewhere."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from helios_jax.models.ops import choices, mesh_axes
from helios_jax.models.ops.choices import Norms
from helios_jax.sharding import BATCH, CONTEXT, RULES
from pallas_kernels import adaln as adaln_kernel
from pallas_kernels import gated_residual as gated_residual_kernel
from pallas_kernels import norm_rope as norm_rope_kernel
from pallas_kernels.core import device
from pallas_kernels.core.rows import Runs
from pallas_kernels.norm_rope import Rotary

HEADS_SPLIT = "heads are split over the mesh's tensor, and their norm is across all heads"
# "xla" for all norms; None for the default of each op of `pallas_kernels`, which is what pays on this device.
Choice = Literal["xla"] | None


def choose(x: Float[Array, "b n d"] | jax.ShapeDtypeStruct, heads: int, asked: Norms | None) -> Choice:
    """The implementation of a block's norms.

    If none is asked for, the device's default runs (`choices`), or XLA if the kernels cannot. Under a mesh that splits
    heads, XLA computes the norm of queries and keys, which is across all heads and needs a sum over devices. The log
    says which implementation runs, and why. Raises ValueError if "pallas" is asked for and cannot run.
    """
    if asked == "xla":
        return "xla"
    reason = norm_rope_kernel.unsupported(x, heads) or _split(x.shape[0])
    if asked == "pallas" and (reason or _heads_split()):
        raise ValueError(f"norms: {reason or HEADS_SPLIT}; leave norms out, or ask for 'xla'")
    if asked is None and choices.default("norms") == "xla":
        choices.say(f"norms by xla ({device.kind()})")
        return "xla"
    if reason:
        choices.say(f"norms by xla ({device.kind()}): {reason}")
        return "xla"
    gated = "pallas" if device.platform() == "gpu" else "xla"
    own = f"xla ({HEADS_SPLIT})" if _heads_split() else "pallas"
    choices.say(
        f"norms ({device.kind()}): queries and keys by {own}; adaLN by xla, its gradient by pallas;"
        f" gated residual by {gated}"
    )
    return None


def check(asked: Norms | None, heads: int, width: int, dtype: Any) -> None:
    """Raises ValueError if the implementation asked for cannot run such tokens here, before weights are read."""
    if asked is not None:
        choose(jax.ShapeDtypeStruct((1, 1, width), dtype), heads, asked)


def adaln(x: Array, shift: Array, scale: Array, runs: Runs, eps: float, by: Choice) -> Float[Array, "b n d"]:
    """`pallas_kernels.adaln.adaln`."""
    op = partial(adaln_kernel.adaln, runs=runs, eps=eps, implementation=by)
    return _on_samples(op, by, x, shift, scale)


def norm_rope(
    x: Float[Array, "b n d"],
    weight: Float[Array, " d"],
    heads: int,
    eps: float,
    table: Rotary | None,
    history_scale: Float[Array, " #heads"] | None,
    num_history: int,
    by: Choice,
) -> Float[Array, "b n heads head_dim"]:
    """`pallas_kernels.norm_rope.norm_rope`."""

    by = "xla" if _heads_split() else by

    def op(x, table, weight, scale):
        return norm_rope_kernel.norm_rope(x, weight, heads, eps, table, scale, num_history, implementation=by)

    return _on_samples(op, by, x, table, weight, history_scale)


def gated_residual(
    x: Array, y: Array, gate: Array, shift: Array, gain: Array, runs: Runs, eps: float, by: Choice
) -> tuple[Float[Array, "b m d"], Float[Array, "b m d"]]:
    """`pallas_kernels.gated_residual.gated_residual`."""
    op = partial(gated_residual_kernel.gated_residual, runs=runs, eps=eps, implementation=by)
    return _on_samples(op, by, x, y, gate, shift, gain)


def fuses_residual(by: Choice) -> bool:
    """True if `gated_residual` is a kernel. Elsewhere XLA fuses the addition into the matrix product before it."""
    return by is None and device.platform() == "gpu"


def head_major(by: Choice) -> bool:
    """True if attention reads arrays head by head ([b, heads, n, head_dim] in memory)."""
    return by is None and device.platform() == "tpu" and not _heads_split()


def _heads_split() -> bool:
    return mesh_axes.size(RULES["heads"]) > 1


def _split(samples: int) -> str | None:
    """The reason why no kernel can run on arrays as the mesh splits them, or None."""
    if mesh_axes.size(CONTEXT) > 1 and not mesh_axes.in_context():
        return f"tokens are split over the mesh's {CONTEXT}, and here no device has a share of its own"
    devices = mesh_axes.size(*BATCH)
    return f"{samples} samples cannot be split over {devices} devices" if samples % devices else None


def _on_samples(op: Callable[..., Any], by: Choice, x: Array, *rest: Any) -> Any:
    """Runs `op` on each device's samples: under a mesh the compiler cannot split the arrays of a kernel."""
    if by == "xla":
        return op(x, *rest)
    samples = PartitionSpec(BATCH)
    specs = jax.tree.map(lambda of: samples if of.ndim == 3 and of.shape[0] == x.shape[0] else PartitionSpec(), rest)
    return mesh_axes.each_device(op, (samples, *specs), samples)(x, *rest)
