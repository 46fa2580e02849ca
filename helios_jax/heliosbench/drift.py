"""Frames that a metric looks at: the first and the last 15 % of a video for a drift, and samples for the slow metrics.

The rounding is upstream's, which differs between metrics.
"""

from itertools import pairwise

import numpy as np

SHARE = 0.15


def ends(count: int, least: int = 1) -> tuple[range, range]:
    """The first and the last 15 % of `count` frames, each `least` frames or more if the video has as many."""
    number = min(count, max(least, int(count * SHARE)))
    return range(number), range(count - number, count)


def middles(count: int, number: int) -> list[int]:
    """The middle frame of each of `number` equal parts; a video of fewer frames is padded with its last one."""
    edges = np.linspace(0, count, min(number, count) + 1).astype(int).tolist()
    found = [(first + last - 1) // 2 for first, last in pairwise(edges)]
    return found + found[-1:] * (number - len(found))


def sampled_ends(count: int, number: int) -> tuple[list[int], list[int]]:
    """`number` frames at even distances of the first and of the last 15 %, which are widened to `number` if shorter."""
    last, first = int(count * SHARE), int(count * (1.0 - SHARE))
    return _sampled(0, max(last, min(count, number)), number), _sampled(
        min(first, max(0, count - number)), count, number
    )


def _sampled(first: int, last: int, number: int) -> list[int]:
    if last - first <= number:
        return np.linspace(first, last - 1, number, dtype=int).tolist()
    step = (last - first) / number
    return [int(first + i * step) for i in range(number)]


def strided(count: int, number: int) -> list[int]:
    """Up to `number` frames from the first on, as far apart as the video allows."""
    step = max(count // number, 1)
    return [i * step for i in range(number) if i * step < count]


def strided_ends(count: int, number: int) -> tuple[list[int], list[int]]:
    """`strided` within the first and within the last 15 %."""
    first, last = ends(count)
    return strided(len(first), number), [last.start + i for i in strided(len(last), number)]
