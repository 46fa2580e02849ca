"""Motion amplitude: the absolute mean of Farneback's optical flow over frames, pixels and both components.

Opposite motions cancel, and the score is in pixels of the scaled video. Upstream chose so, and its numbers need it.
"""

import numpy as np

from helios_jax.heliosbench.bench_frames import Frame
from helios_jax.heliosbench.metric import Clip, Measured, require

COLUMNS = 16  # of the map that a flow is averaged to
FLOW = {
    "pyr_scale": 0.5,
    "levels": 3,
    "winsize": 15,
    "iterations": 3,
    "poly_n": 5,
    "poly_sigma": 1.2,
    "flags": 0,
}


class Amplitude:
    """The metric; it needs OpenCV."""

    files = ("motion_amplitude",)

    def __init__(self):
        require("cv2")

    def begin(self, clip: Clip) -> "AmplitudeMeter":
        return AmplitudeMeter()


class AmplitudeMeter:
    """The flow between neighbouring frames, summed up."""

    def __init__(self):
        self._last: np.ndarray | None = None
        self._total: np.ndarray | None = None
        self._curve: list[tuple[float, float]] = []

    def add(self, frame: Frame) -> None:
        import cv2

        grey = cv2.cvtColor(frame.scaled, cv2.COLOR_RGB2GRAY)
        if self._last is not None:
            flow = cv2.calcOpticalFlowFarneback(self._last, grey, None, **FLOW)  # pyright: ignore
            height, width = grey.shape
            size = (COLUMNS, max(1, int(height * (COLUMNS / width))))
            small = cv2.resize(flow, size, interpolation=cv2.INTER_AREA)
            # In float32, as numpy's mean over the first axis does.
            self._total = small if self._total is None else self._total + small
            self._curve.append((frame.number, abs(float(small.mean()))))
        self._last = grey

    def finish(self) -> Measured:
        score = 0.0 if self._total is None else abs(float(np.mean(self._total / np.float32(len(self._curve)))))
        return Measured({"motion_amplitude": {"motion_fb": score}}, self._curve)
