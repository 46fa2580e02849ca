"""The protocol of metrics: a `Metric` makes a `Meter` for each video, which sees its frames in order, one by one."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from helios_jax.heliosbench.bench_frames import Frame
from helios_jax.heliosbench.rating import Length


@dataclass(frozen=True)
class Clip:
    """Facts of a video that are known before its frames are read: its prompt, their number, and how it is judged."""

    prompt: str
    frames: int
    length: Length = "long"


@dataclass
class Measured:
    """Scores of a video: by result file the fields of upstream's item, and values along it as (frame, value)."""

    scores: dict[str, dict[str, Any]]
    curve: list[tuple[float, float]] = field(default_factory=list)


@runtime_checkable
class Meter(Protocol):
    """A measurement of one video that is under way."""

    def add(self, frame: Frame) -> None:
        """Looks at the next frame."""
        ...

    def finish(self) -> Measured:
        """The scores, after the last frame."""
        ...


@runtime_checkable
class Metric(Protocol):
    """A metric, with its network if it has one. `files` names the result files that it fills."""

    files: tuple[str, ...]

    def begin(self, clip: Clip) -> Meter:
        """Starts on a video."""
        ...


class MissingError(ValueError):
    """A metric that cannot be computed here; the message is one line that says what is missing, and the remedy."""


# Packages of the extra `heliosbench`, by the modules that are imported.
PACKAGES = {"cv2": "OpenCV", "openai": "openai", "onnxruntime": "ONNX Runtime"}


def require(module: str) -> None:
    """Raises MissingError if a package is not installed."""
    if importlib.util.find_spec(module) is None:
        raise MissingError(f"{PACKAGES[module]} is not installed: pip install 'helios_jax[heliosbench]'")


def drifted(name: str, start: float, end: float) -> Mapping[str, float]:
    """The fields of a drift: the difference between start and end, and both."""
    return {
        f"drift_{name}_score": abs(start - end),
        f"start_{name}_score": start,
        f"end_{name}_score": end,
    }


class MetricError(ValueError):
    """A metric that failed on one video; the message is one line. The other metrics go on."""
