"""Scores of a job: the file that a scorer writes, and its metrics as arrays over seeds and videos.

A scorer writes `scores.json` into its folder:

    {"videos": [{"id": "0", "colour_shift": 0.02, "motion": 0.9}, ...],
     "seconds": {"colour": [[1.0, 1.0, 0.9], ...]},
     "picture": "sheet.png"}

`videos` has a number for each metric, the same metrics for each video. `seconds` (may be left out) has for each metric
a list for each video, one number a second. `picture` (may be left out) is a file beside it that shows the videos.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from helios_jax.config_types import shown

FILE = "scores.json"


class ScoreError(ValueError):
    """Scores that cannot be used; the message is one line."""


@dataclass(frozen=True)
class Scores:
    """Scores of the videos named `ids`: `metrics` are [videos] each, `seconds` are [videos, seconds] each."""

    ids: tuple[str, ...]
    metrics: dict[str, Float[np.ndarray, " v"]]
    seconds: dict[str, Float[np.ndarray, "v s"]] = field(default_factory=dict)
    picture: Path | None = None


def write(
    folder: Path,
    videos: Sequence[Mapping[str, Any]],
    seconds: Mapping[str, Sequence[Sequence[float]]] | None = None,
    picture: str | None = None,
) -> None:
    """Writes the scores of a job into its folder."""
    scores = {"videos": list(videos), "seconds": seconds or {}, "picture": picture}
    (folder / FILE).write_text(json.dumps(scores, indent=1) + "\n")


def read(folder: Path) -> Scores:
    """The scores in a job's folder. Raises ScoreError for a file that is missing or malformed."""
    path = folder / FILE
    try:
        told = json.loads(path.read_text())
        videos = [dict(one) for one in told["videos"]]
        ids = tuple(str(one.pop("id")) for one in videos)
        metrics = {name: np.array([float(one[name]) for one in videos]) for name in videos[0]}
        given, picture = told.get("seconds") or {}, told.get("picture")
        seconds = {name: np.array(each, float) for name, each in given.items()} if isinstance(given, dict) else None
    except FileNotFoundError:
        raise ScoreError(f"{path} is missing: the step score must write it (helios_jax/ablations/scores.py)") from None
    except (OSError, ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
        raise ScoreError(f"{path}: {type(error).__name__}: {error}; see helios_jax/ablations/scores.py") from None
    if not metrics:
        raise ScoreError(f"{path}: videos have no metric; see helios_jax/ablations/scores.py")
    if seconds is None:
        raise ScoreError(f"{path}: seconds must have a list for each video under each metric, got {shown(given)}")
    if not isinstance(picture, str | None):
        raise ScoreError(f"{path}: picture must be the name of a file beside it, got {shown(picture)}")
    if odd := [name for name, values in metrics.items() if not all(map(math.isfinite, values))]:
        raise ScoreError(f"{path}: {odd[0]} is not a number for every video")
    if wrong := [name for name, values in seconds.items() if values.ndim != 2 or len(values) != len(ids)]:
        raise ScoreError(f"{path}: seconds of {wrong[0]}: one list of the same length is needed for each video")
    return Scores(ids, metrics, seconds, None if picture is None else folder / picture)


def together(found: Mapping[int, Scores], row: str) -> dict[str, Float[np.ndarray, "s v"]]:
    """The values of each metric of a row over its seeds, [seeds, videos]. Raises ScoreError if seeds do not agree."""
    first, *others = found.values()
    for seed, scores in found.items():
        if scores.ids != first.ids or scores.metrics.keys() != first.metrics.keys():
            raise ScoreError(f"{row}: seed {seed} has other videos or metrics than seed {min(found)}: score both alike")
    return {name: np.stack([scores.metrics[name] for scores in (first, *others)]) for name in first.metrics}
