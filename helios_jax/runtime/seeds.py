"""Random keys from seeds of 64 bits."""

import operator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import jax

SEEDS = 2**64


def check_seed(seed: Any, name: str = "seed") -> int:
    """`seed` as an int; raises ValueError for one that is no whole number from 0 to 2^64 - 1."""
    try:
        value = operator.index(seed)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {seed!r}") from None
    if isinstance(seed, bool) or not 0 <= value < SEEDS:
        raise ValueError(f"{name} must be from 0 to 2^64 - 1, got {seed}")
    return value


def key(seed: Any) -> "jax.Array":
    """The random key of a 64-bit seed; below 2^32 it equals `jax.random.key`, which takes only 32 bits."""
    import jax  # takes seconds, and most callers only check

    seed = check_seed(seed)
    bits: Any = np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)
    return jax.random.wrap_key_data(bits, impl="threefry2x32")
