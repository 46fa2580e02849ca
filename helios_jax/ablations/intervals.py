"""Means with intervals over seeds and videos.

Values are [seeds, videos]. Rows of a table make the same videos, so a difference is taken video by video, and its
interval is narrower than those of the two means. All seeds make the same videos, too: a caption that is hard for one
training is mostly hard for the next, and says little new there.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.special import stdtrit

LEVEL = 0.95


@dataclass(frozen=True)
class Mean:
    """A mean, and the interval that holds it with a probability of `LEVEL`."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        known = math.isfinite(self.low)
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]" if known else f"{self.value:.3g}"


def mean(values: Float[np.ndarray, "s v"]) -> Mean:
    """The mean of all values, with an interval over further seeds and further videos.

    A value is a sum of an effect of its seed, one of its video, and a rest. The mean squares of a two-way analysis of
    variance give the variance of the mean, and Satterthwaite's formula its degrees of freedom for Student's t. A
    bootstrap of three seeds would be too narrow: it knows no spread beyond theirs. With one seed, the interval covers
    the videos alone. A single value has no interval: its ends are infinite.
    """
    count, value = np.array(values.shape), float(values.mean())
    free = count - 1
    by_seed, by_video = values.mean(1) - value, values.mean(0) - value
    rest = values - value - by_seed[:, None] - by_video
    # Mean squares of seeds, of videos and of the rest, with their degrees of freedom. One seed or video has none.
    squares = np.array([values.size / len(each) * (each**2).sum() for each in (by_seed, by_video)])
    terms = [(square / n, int(n)) for square, n in zip(squares, free) if n]
    if not terms:
        return Mean(value, -math.inf, math.inf)
    variance = sum(square for square, _ in terms)
    if len(terms) == 2:
        terms.append(((rest**2).sum() / free.prod(), int(free.prod())))
        # An effect that is estimated as less than nothing counts as none.
        variance = max(variance - terms[2][0], terms[0][0], terms[1][0])
    spread = sum(square**2 / n for square, n in terms)
    degrees = max(1.0, variance**2 / spread) if spread else 1.0
    half = float(stdtrit(degrees, (1 + LEVEL) / 2)) * math.sqrt(variance / values.size)
    return Mean(value, value - half, value + half)
