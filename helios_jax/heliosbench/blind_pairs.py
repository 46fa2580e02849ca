"""Pairs of videos that people compare without knowing the models, and the win rates that follow."""

import csv
import itertools
import math
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from helios_jax.config import ConfigError
from helios_jax.heliosbench.bench_videos import BenchVideo

Z = 1.959964  # of an interval of 95 %
CHOICES = ("left", "right", "tie")
COLUMNS = ("rater", "pair", "id", "left", "right", "choice", "seconds")


@dataclass(frozen=True)
class Pair:
    """Two videos of one prompt, and the names of their models."""

    left: BenchVideo
    right: BenchVideo
    left_model: str
    right_model: str


def draw_pairs(models: Mapping[str, Sequence[BenchVideo]], limit: int | None, seed: int) -> list[Pair]:
    """Pairs of all models over the prompts that both have, in random order and on random sides.

    With `limit`, that many at most, evenly over the pairs of models. Raises ConfigError if no prompt is shared.
    """
    rng = random.Random(seed)
    queues = []
    for first, second in itertools.combinations(models, 2):
        theirs = {video.id: video for video in models[second]}
        shared = [(video, theirs[video.id]) for video in models[first] if video.id in theirs]
        if not shared:
            raise ConfigError(f"{first} and {second} share no prompt; compare folders of the same ids")
        rng.shuffle(shared)
        queues.append([Pair(one, other, first, second) for one, other in shared])
    evenly = [pair for several in itertools.zip_longest(*queues) for pair in several if pair is not None]
    chosen = evenly[:limit]
    rng.shuffle(chosen)
    return [
        Pair(p.right, p.left, p.right_model, p.left_model) if rng.random() < 0.5 else p for p in chosen
    ]  # fmt: skip


@dataclass(frozen=True)
class WinRate:
    """A model's results: `rate` counts a tie as half a win, `interval` is Wilson's of 95 %."""

    model: str
    comparisons: int
    wins: int
    ties: int
    losses: int

    @property
    def rate(self) -> float:
        """Share of comparisons that were won."""
        return (self.wins + self.ties / 2) / self.comparisons

    @property
    def interval(self) -> tuple[float, float]:
        """Low and high end."""
        n, rate = self.comparisons, self.rate
        middle = (rate + Z**2 / (2 * n)) / (1 + Z**2 / n)
        half = Z / (1 + Z**2 / n) * math.sqrt(rate * (1 - rate) / n + Z**2 / (4 * n**2))
        return max(0.0, middle - half), min(1.0, middle + half)


def win_rates(judgments: Iterable[Mapping[str, str]]) -> list[WinRate]:
    """The win rates of all models by name."""
    counts: dict[str, Counter] = {}
    for one in judgments:
        for side in ("left", "right"):
            outcome = "ties" if one["choice"] == "tie" else "wins" if one["choice"] == side else "losses"
            counts.setdefault(one[side], Counter())[outcome] += 1
    return [
        WinRate(name, count.total(), count["wins"], count["ties"], count["losses"])
        for name, count in sorted(counts.items())
    ]


def read_judgments(path: Path) -> list[dict[str, str]]:
    """The rows of a file that the page saved; raises ConfigError for another file."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    if not rows or any(tuple(row) != COLUMNS or row["choice"] not in CHOICES for row in rows):
        raise ConfigError(f"{path}: is no file of judgments; it begins with {','.join(COLUMNS)}")
    return rows
