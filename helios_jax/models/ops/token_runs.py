"""Runs of tokens that are next to one another, for cuts that are known when a program is compiled."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Shaped

TokenRuns = list[tuple[int, int]]  # [start, stop)


def runs_of(chosen: Bool[np.ndarray, " n"]) -> TokenRuns:
    """Runs of True."""
    edges = np.flatnonzero(np.diff(chosen, prepend=False, append=False))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def take(x: Shaped[Array, "b n *rest"], runs: TokenRuns) -> Shaped[Array, "b m *rest"]:
    """The tokens of all runs."""
    return jnp.concatenate([x[:, start:stop] for start, stop in runs], 1)
