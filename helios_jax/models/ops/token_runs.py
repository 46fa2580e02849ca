"""Runs of consecutive tokens: slices that are known when a program is compiled."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Shaped

TokenRuns = list[tuple[int, int]]  # [start, stop)


def runs_of(chosen: Bool[np.ndarray, " n"]) -> TokenRuns:
    """The runs of consecutive True values."""
    edges = np.flatnonzero(np.diff(chosen, prepend=False, append=False))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def take(x: Shaped[Array, "b n *rest"], runs: TokenRuns) -> Shaped[Array, "b m *rest"]:
    """The tokens of all runs, one run after the other."""
    return jnp.concatenate([x[:, start:stop] for start, stop in runs], 1)
