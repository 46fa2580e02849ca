"""From raw scores to ratings of 1 to 10, and from ratings to the weighted total of short or long videos.

Upstream's tables hold two slips, which are repaired unless `strict` asks for its exact numbers: two thresholds of long
videos' aesthetic score that no score can reach, and an average of exactly 0 that counts as missing (`result_files`).
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

Length = Literal["short", "long"]
LENGTHS: tuple[Length, ...] = get_args(Length)
SHORT_FRAMES = 81  # a short video is the first 81 frames of a long one
SCALE = 10

BASIC: tuple[str, ...] = ("aesthetic", "motion_amplitude", "motion_smoothness", "semantic", "naturalness")
DRIFTS: tuple[str, ...] = tuple(f"drifting_{name}" for name in BASIC if name != "motion_amplitude")
METRICS: dict[Length, tuple[str, ...]] = {"short": BASIC, "long": BASIC + DRIFTS}

WEIGHTS: dict[Length, dict[str, float]] = {
    "short": dict(zip(BASIC, (0.10, 0.10, 0.10, 0.35, 0.35))),
    # They add up to 0.996, so that 9.96 is the highest total. Published totals have them, so this is no slip to repair.
    "long": {**dict(zip(BASIC, (0.03, 0.03, 0.03, 0.255, 0.255))), **dict.fromkeys(DRIFTS, 0.099)},
}

# A score that reaches the first threshold is rated 10, the second 9, and so on; one that reaches none is rated 1.
# High scores are good; of drifts low ones are.
THRESHOLDS = {
    "aesthetic": (0.70, 0.65, 0.60, 0.55, 0.50, 0.45, 0.40, 0.35, 0.30),
    "motion_amplitude": (0.45, 0.40, 0.35, 0.30, 0.25, 0.20, 0.15, 0.10, 0.05),
    "motion_smoothness": (0.99, 0.98, 0.97, 0.96, 0.95, 0.94, 0.93, 0.92, 0.91),
    "semantic": (0.30, 0.29, 0.28, 0.27, 0.26, 0.25, 0.24, 0.23, 0.22),
    "naturalness": (0.65, 0.60, 0.55, 0.50, 0.45, 0.40, 0.30, 0.25, 0.20),
    **dict.fromkeys(DRIFTS, (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09)),
    "drifting_naturalness": (0.06, 0.08, 0.10, 0.12, 0.14, 0.16, 0.18, 0.20, 0.22),
}
STRICT_LONG_AESTHETIC = (0.70, 0.65, 0.60, 0.55, 0.50, 0.45, 0.40, 0.45, 0.40)  # ratings 3 and 2 are never given


def is_drift(metric: str) -> bool:
    """True for metrics that compare a video's start with its end."""
    return metric in DRIFTS


def normalized(score: Any) -> float | None:
    """The score clipped to [0, 1]; None for a value that is no number."""
    if isinstance(score, bool) or not isinstance(score, int | float) or math.isnan(score):
        return None
    return max(0.0, min(1.0, float(score)))


def rate(metric: str, score: float | None, length: Length, strict: bool = False) -> int | None:
    """The rating of a normalized score: 1 to 10, None without a score."""
    if score is None:
        return None
    thresholds = THRESHOLDS[metric]
    if strict and (metric, length) == ("aesthetic", "long"):
        thresholds = STRICT_LONG_AESTHETIC
    for i, threshold in enumerate(thresholds):
        if score <= threshold if is_drift(metric) else score >= threshold:
            return SCALE - i
    return 1


def total(ratings: Mapping[str, int | None], length: Length) -> float:
    """The weighted total. A metric without a rating adds nothing, so that the total is partial."""
    present = ((rating, weight) for metric, weight in WEIGHTS[length].items() if (rating := ratings.get(metric)))
    return round(sum(rating * weight for rating, weight in present), 4)


def throughput_score(fps: float) -> int:
    """The score of a speed in frames per second: a point for each 3.2, from 1 to 10; it is not part of the total."""
    return max(1, min(SCALE, math.ceil(fps / 3.2)))
