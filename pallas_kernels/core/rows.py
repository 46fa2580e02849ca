"""Parts of all kernels over rows: the table row of each token, by runs, and checks of the inputs."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.core.dispatch import no_kernels

# Lengths of runs of tokens: the tokens of the first run take the table's first row, those of the second run the next.
Runs = tuple[int, ...]
LANES = 128


def spread(table: Float[Array, "b runs d"], runs: Runs) -> Float[Array, "b n d"]:
    """Each token's row, as a select that fuses into its consumer; [b, 1, d] if there is one run."""
    token, out = jnp.arange(sum(runs))[None, :, None], table[:, :1]
    for i, start in enumerate(np.cumsum(runs)[:-1], 1):
        out = jnp.where(token >= start, table[:, i : i + 1], out)
    return out


def as_given(gradient: Float[Array, "b runs d"], table: Float[Array, "#b runs d"]) -> Float[Array, "#b runs d"]:
    """A table's gradient in the table's shape and dtype, summed over the samples that share it."""
    return (gradient if table.shape[0] != 1 else gradient.sum(0, keepdims=True)).astype(table.dtype)


def check(op: str, x: Float[Array, "b n d"], runs: Runs, *tables: Array) -> None:
    """Raises ValueError if `runs` or `tables` do not fit the tokens."""
    if sum(runs) != x.shape[1] or min(runs) < 1:
        raise ValueError(f"{op}: runs {runs} must be positive and have the sum {x.shape[1]}, the number of tokens")
    for table in tables:
        if table.shape[1:] != (len(runs), x.shape[2]) or table.shape[0] not in (1, x.shape[0]):
            shape = (x.shape[0], len(runs), x.shape[2])
            raise ValueError(f"{op}: a table has shape {table.shape}, and {shape} or 1 instead of {shape[0]} is needed")


def unsupported(op: str, x: Array | jax.ShapeDtypeStruct, width: int) -> str | None:
    """The reason why a kernel over rows of `width` features cannot run here, or None."""
    if reason := no_kernels(op):
        return reason
    if width % LANES:
        return f"Pallas {op} is for widths in multiples of {LANES}, not {width}"
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"Pallas {op} is for bfloat16 and float32, not {x.dtype}"
    return None


def fitting(n: int, largest: int) -> int:
    """Tokens per block on a TPU: at most `largest` and about the number of tokens, in whole tiles of 16-bit numbers."""
    return min(largest, -(-n // 16) * 16)
