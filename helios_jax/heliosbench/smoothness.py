"""Motion smoothness: how well AMT-S interpolates every second frame from its neighbours, and its drift.

AMT's code and weights are for non-commercial use and not part of this project. The network is a file of the user's,
ONNX or TorchScript, which takes two pictures float32 [1, 3, h, w] from 0 to 1 and gives the one between them.
"""

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from helios_jax.heliosbench import drift
from helios_jax.heliosbench.bench_frames import Frame
from helios_jax.heliosbench.metric import Clip, Measured, MetricError, drifted, require
from helios_jax.messages import one_line
from helios_jax.pretrained.errors import CheckpointError

MULTIPLE = 16  # of height and width, which the network needs
LEAST = 4  # frames of a start or an end; a shorter video scores 0 there
Interpolate = Callable[[Float[np.ndarray, "1 3 h w"], Float[np.ndarray, "1 3 h w"]], Float[np.ndarray, "1 3 h w"]]


class Smoothness:
    """The metric, with AMT-S in the file `network`."""

    files = ("motion_smoothness", "drifting_motion_smoothness")

    def __init__(self, network: Path):
        require("cv2")
        self._interpolate = _onnx(network) if network.suffix == ".onnx" else _torchscript(network)

    def begin(self, clip: Clip) -> "SmoothnessMeter":
        return SmoothnessMeter(self._interpolate, clip)


class SmoothnessMeter:
    """Interpolates frames from the frames before and after them, and keeps the errors."""

    def __init__(self, interpolate: Interpolate, clip: Clip):
        self._interpolate = interpolate
        whole = range(clip.frames)
        self._parts = [whole, *(drift.ends(clip.frames, LEAST) if clip.length == "long" else ())]
        self._wanted = {first for part in self._parts for first in _firsts(part)}
        self._recent: deque[np.ndarray] = deque(maxlen=3)
        self._errors: dict[int, float] = {}

    def add(self, frame: Frame) -> None:
        self._recent.append(frame.resized)
        if (first := frame.number - 2) in self._wanted:
            before, truth, after = self._recent
            guess = between(self._interpolate, before, after)
            self._errors[first] = float(np.abs(truth.astype(np.int16) - guess).mean())

    def finish(self) -> Measured:
        if not self._errors:
            raise MetricError("motion_smoothness needs 3 frames or more")
        whole, *ends = (self._score(part) for part in self._parts)
        found: dict = {"motion_smoothness": {"motion_smoothness_score": whole}}
        if ends:
            short = len(self._parts[1]) < LEAST
            start, end = (0.0, 0.0) if short else ends
            found["drifting_motion_smoothness"] = dict(drifted("motion_smoothness", start, end))
        return Measured(found, [(first + 1, 1 - error / 255) for first, error in sorted(self._errors.items())])

    def _score(self, part: range) -> float:
        return (255.0 - float(np.mean([self._errors[first] for first in _firsts(part)]))) / 255.0


def _firsts(part: range) -> range:
    """The first of each three frames of which the middle one is interpolated."""
    return part[:-2:2]


def between(
    interpolate: Interpolate, before: UInt8[np.ndarray, "h w 3"], after: UInt8[np.ndarray, "h w 3"]
) -> UInt8[np.ndarray, "h w 3"]:
    """The interpolated frame between two, which are padded for the network by repeating their edges."""
    height, width = before.shape[:2]
    down, right = -height % MULTIPLE, -width % MULTIPLE
    edges = ((down // 2, down - down // 2), (right // 2, right - right // 2), (0, 0))

    def planes(rgb: np.ndarray) -> np.ndarray:
        return np.pad(rgb, edges, "edge").transpose(2, 0, 1)[None].astype(np.float32) / np.float32(255)

    guess = interpolate(planes(before), planes(after))[0].transpose(1, 2, 0)
    guess = guess[edges[0][0] :][:height, edges[1][0] :][:, :width]
    return (guess * np.float32(255)).clip(0, 255).astype(np.uint8)


def _onnx(path: Path) -> Interpolate:
    require("onnxruntime")
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(path), providers=onnxruntime.get_available_providers())
    except Exception as error:  # it raises classes of its own
        raise CheckpointError(f"{path} cannot be read ({one_line(error)}): export it again") from None
    names = [given.name for given in session.get_inputs()]
    if len(names) != 2:
        raise CheckpointError(f"{path} takes {len(names)} inputs, not two pictures: export it again")

    def interpolate(before: np.ndarray, after: np.ndarray) -> np.ndarray:
        try:
            return np.asarray(session.run(None, dict(zip(names, (before, after))))[0])
        except Exception as error:
            raise MetricError(f"{path.name} failed at {before.shape[2:]}: {one_line(error)}") from None

    return interpolate


def _torchscript(path: Path) -> Interpolate:
    import torch

    try:
        network: Any = torch.jit.load(str(path), map_location="cuda" if torch.cuda.is_available() else "cpu").eval()
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read ({one_line(error)}): export it as TorchScript or ONNX") from None
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def interpolate(before: np.ndarray, after: np.ndarray) -> np.ndarray:
        try:
            with torch.inference_mode():
                return network(*(torch.from_numpy(x).to(device) for x in (before, after))).cpu().numpy()
        except Exception as error:
            raise MetricError(f"{path.name} failed at {before.shape[2:]}: {one_line(error)}") from None

    return interpolate
