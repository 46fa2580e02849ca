"""Scores that the paper publishes, to stand beside ours."""

from dataclasses import dataclass

SOURCE = "https://arxiv.org/abs/2603.04379"


@dataclass(frozen=True)
class Published:
    """A system's totals for short and for long videos, and its speed in frames per second on one H100."""

    name: str
    short: float | None = None
    long: float | None = None
    fps: float | None = None


PUBLISHED = (
    Published("Helios-Distilled", short=6.00, long=6.94, fps=19.53),
    Published("Reward-Forcing", long=6.88),
    Published("SANA-Video-Long", fps=13.24),
    Published("Krea-Realtime-14B", fps=6.7),
    Published("Helios-Mid", fps=1.05),
)
