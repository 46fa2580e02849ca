"""Border jumps: the change from a chunk's last frame to the next chunk's first, beside the changes within chunks.

The paper's ablations discuss them, its benchmark does not measure them. The score is the mean difference of pixels (0
to 255) across borders less that within chunks: 0 for a video without seams. It is not part of the total.
"""

import numpy as np

from helios_jax.heliosbench.bench_frames import Frame
from helios_jax.heliosbench.metric import Clip, Measured
from helios_jax.sampling.chunk_frames import ChunkFrames


class BorderJumps:
    """The metric; `chunks` are the frames that the model makes at a time."""

    files = ("border_jumps",)

    def __init__(self, chunks: ChunkFrames):
        self.chunks = chunks

    def begin(self, clip: Clip) -> "BorderMeter":
        return BorderMeter(self.chunks)


class BorderMeter:
    """Differences of neighbouring frames."""

    def __init__(self, chunks: ChunkFrames):
        self._chunks = chunks
        self._last: np.ndarray | None = None
        self._curve: list[tuple[float, float]] = []

    def add(self, frame: Frame) -> None:
        pixels = frame.scaled.astype(np.int16)
        if self._last is not None:
            self._curve.append((frame.number, float(np.abs(pixels - self._last).mean())))
        self._last = pixels

    def finish(self) -> Measured:
        """No score for a video of one chunk."""
        changes = np.array([value for _, value in self._curve])
        border = np.zeros(len(changes), bool)
        border[self._chunks.borders] = True
        if not border.any() or border.all():
            return Measured({}, self._curve)
        across, inside = float(changes[border].mean()), float(changes[~border].mean())
        fields = {"border_jumps_score": across - inside, "across_borders": across, "within_chunks": inside}
        return Measured({"border_jumps": fields}, self._curve)
