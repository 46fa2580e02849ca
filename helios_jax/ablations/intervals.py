"""Means with intervals: a bootstrap over seeds and, within a seed, over videos.

Values are [seeds, videos]. Rows of a table make the same videos (prompt and noise), so a difference is taken video by
video, and its interval is narrower than those of the two means.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

LEVEL = 0.95
DRAWS = 4000


@dataclass(frozen=True)
class Mean:
    """A mean, and the interval that holds it with a probability of `LEVEL`."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def mean(values: Float[np.ndarray, "s v"]) -> Mean:
    """The mean of all values. With one seed, the interval covers the videos alone, and is too narrow."""
    seeds, videos = values.shape
    rng = np.random.default_rng(0)
    drawn = rng.integers(seeds, size=(DRAWS, seeds))
    each = rng.integers(videos, size=(DRAWS, seeds, videos))
    means = values[drawn[:, :, None], each].mean((1, 2))
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Mean(float(values.mean()), float(low), float(high))
