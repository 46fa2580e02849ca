"""Closeness of results that are equal but for rounding: how far apart two are, and how far they may be."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Tolerance for latents encoded from uint8 pixels: another program may round a pixel to the next byte. One such pixel
# was seen to change the latents by 1.5e-4; another frame changes them by more than 0.1.
BYTES = 2e-3


def error(got: Any, expected: Any, terms: float = 0) -> float:
    """norm(got - expected) / norm(expected), infinite for NaN.

    The divisor is at least the norm of an array of numbers of size `terms`. Without `terms`, anything but zeros where
    zeros are expected is an infinite error.
    """
    got, expected = (np.asarray(x, np.float64) for x in (got, expected))
    assert got.shape == expected.shape, f"shape {got.shape}, not {expected.shape}"
    apart, size = np.linalg.norm(got - expected), max(np.linalg.norm(expected), terms * expected.size**0.5)
    if apart == 0:
        return 0.0
    return float(apart / size) if size > 0 and np.isfinite(apart) and np.isfinite(size) else np.inf


def assert_close(
    got: Any, expected: Any, *, dtype: Any = jnp.float32, ulps: float | None = None, terms: float = 0
) -> None:
    """Asserts that the error of each array of `got` is at most `ulps` times the eps of `dtype`.

    The compiler chooses the order of a sum anew for each processor, and each order rounds otherwise. A number is then
    off by some eps of the largest terms of its sum, though it may itself be almost zero. So the error is a part of the
    norm of the whole array, and no number has a tolerance of its own.

    dtype: the coarsest that the arrays went through
    ulps: about ten times what was seen. Results of the tests' tiny networks were seen 4 eps apart in float32, and 0.4
      in half precision, where sums are float32 and only results are rounded: 40 and 4 where nothing is given
    terms: size of the terms of sums that cancel, as those of some gradients do, which are zero but for rounding
    """
    bar = (ulps or (40 if dtype == jnp.float32 else 4)) * float(jnp.finfo(dtype).eps)
    for (path, a), (other, b) in zip(*map(jax.tree.leaves_with_path, (got, expected)), strict=True):
        assert path == other
        value = error(a, b, terms)
        assert value <= bar, f"error {value:.2e} is above {bar:.2e} {jax.tree_util.keystr(path)}"
