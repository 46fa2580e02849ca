"""Naturalness: a judge's answer to 16 frames of a video, and to 16 of its start and of its end."""

import numpy as np

from helios_jax.heliosbench import drift
from helios_jax.heliosbench.bench_frames import Frame
from helios_jax.heliosbench.judge import Judge
from helios_jax.heliosbench.metric import Clip, Measured, drifted, require

PICTURES = 16
QUALITY = 95  # of JPEGs


class Naturalness:
    """The metric; threads may share it."""

    files = ("naturalness", "drifting_naturalness")

    def __init__(self, judge: Judge):
        require("cv2")
        self.judge = judge

    def begin(self, clip: Clip) -> "NaturalnessMeter":
        return NaturalnessMeter(self.judge, samples(clip))


def samples(clip: Clip) -> list[list[int]]:
    """The frames of each request: of the whole video and, for a long one, of its start and end."""
    whole = [drift.strided(clip.frames, PICTURES)]
    return whole if clip.length == "short" else [*whole, *drift.strided_ends(clip.frames, PICTURES)]


class NaturalnessMeter:
    """Collects the pictures; asks at the end."""

    def __init__(self, judge: Judge, samples: list[list[int]]):
        self._judge, self._samples = judge, samples
        self._wanted = {number for sample in samples for number in sample}
        self._pictures: dict[int, bytes] = {}

    def add(self, frame: Frame) -> None:
        if frame.number in self._wanted:
            self._pictures[frame.number] = jpeg(frame.picture)

    def finish(self) -> Measured:
        answers = [self._judge.ask([self._pictures[number] for number in sample]) for sample in self._samples]
        whole, *ends = answers
        scores: dict = {"naturalness": {"naturalness_score": whole.score, "raw_score": whole.text}}
        if ends:
            start, end = ends
            scores["drifting_naturalness"] = {
                **drifted("naturalness", start.score, end.score),
                "start_raw_score": start.text,
                "end_raw_score": end.text,
            }
        middle = [sum(sample) / len(sample) for sample in self._samples]
        points = sorted(zip(middle, (answer.score for answer in answers)))
        return Measured(scores, points)


def jpeg(rgb: np.ndarray) -> bytes:
    """A picture as a JPEG file."""
    import cv2

    done, data = cv2.imencode(".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    assert done
    return data.tobytes()
