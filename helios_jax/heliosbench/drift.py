"""Frames that a metric looks at: the first and the last 15 % of a video for a drift, and samples for the slow metrics.

The rounding is upstream's, which differs between metrics.
"""

import math
from itertools import pairwise

import numpy as np

SHARE = 0.15


def ends(count: int, least: int = 1) -> tuple[range, range]:
    """The first and the last 15 % of `count` frames, each `least` frames or more where there are as many."""
    number = min(count, max(least, int(count * SHARE)))
    return range(number), range(count - number, count)


def middles(count: int, number: int) -> list[int]:
    """The middle frame of each of `number` equal parts; a video of fewer frames is padded with its last one."""
    edges = np.linspace(0, count, min(number, count) + 1).astype(int).tolist()
    found = [(first + last - 1) // 2 for first, last in pairwise(edges)]
    return found + found[-1:] * (number - len(found))


def sampled_ends(count: int, number: int) -> tuple[list[int], list[int]]:
    """`number` frames at even distances of the first and of the last 15 %, which are widened if they are shorter."""
    starts, stops = (0.0, 1.0 - SHARE), (SHARE, 1.0)
    start, end = (_sampled(count, int(count * a), int(count * b), number) for a, b in zip(starts, stops))
    return start, end


def _sampled(count: int, first: int, last: int, number: int) -> list[int]:
    if (lacking := number - (last - first)) <= 0:
        step = (last - first) / number
        return [min(int(first + i * step), count - 1) for i in range(number)]
    wide_first = max(0, first - math.ceil(lacking / 2))
    wide_last = min(count, last + lacking // 2)
    if wide_last - wide_first < number:
        if wide_first == 0:
            wide_last = min(count, number)
        elif wide_last == count:
            wide_first = max(0, count - number)
    return [min(i, count - 1) for i in np.linspace(wide_first, wide_last - 1, number, dtype=int).tolist()]


def strided(count: int, number: int) -> list[int]:
    """`number` frames from the first on, at the distance that fits them into the video."""
    step = max(count // number, 1)
    return [i * step for i in range(number) if i * step < count]


def strided_ends(count: int, number: int) -> tuple[list[int], list[int]]:
    """`strided` within the first and within the last 15 %."""
    first, last = ends(count)
    return strided(len(first), number), [last.start + i for i in strided(len(last), number)]
