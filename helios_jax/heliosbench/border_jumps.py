"""Border jumps: the change from a chunk's last frame to the next chunk's first, beside the changes within chunks.

The paper's ablations speak of them, its benchmark does not see them. The score is the mean difference of pixels (0 to
255) across borders less that within chunks: 0 for a video without seams. It is not part of the total.
"""

import numpy as np

from helios_jax.heliosbench.bench_frames import Frame
from helios_jax.heliosbench.metric import Clip, Measured


class BorderJumps:
    """The metric; `chunk` is the number of frames that the model makes at a time."""

    files = ("border_jumps",)

    def __init__(self, chunk: int = 33):
        self.chunk = chunk

    def begin(self, clip: Clip) -> "BorderMeter":
        return BorderMeter(self.chunk)


class BorderMeter:
    """Differences of neighbouring frames."""

    def __init__(self, chunk: int):
        self._chunk = chunk
        self._last: np.ndarray | None = None
        self._curve: list[tuple[float, float]] = []

    def add(self, frame: Frame) -> None:
        pixels = frame.scaled.astype(np.int16)
        if self._last is not None:
            self._curve.append((frame.number, float(np.abs(pixels - self._last).mean())))
        self._last = pixels

    def finish(self) -> Measured:
        """No score for a video of one chunk."""
        borders = [value for number, value in self._curve if number % self._chunk == 0]
        within = [value for number, value in self._curve if number % self._chunk]
        if not borders or not within:
            return Measured({}, self._curve)
        across, inside = float(np.mean(borders)), float(np.mean(within))
        fields = {"border_jumps_score": across - inside, "across_borders": across, "within_chunks": inside}
        return Measured({"border_jumps": fields}, self._curve)
