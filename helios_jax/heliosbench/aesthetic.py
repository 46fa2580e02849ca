"""Aesthetic score: LAION's linear head on CLIP's features of every frame, and its drift."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from helios_jax.heliosbench import drift
from helios_jax.heliosbench.bench_frames import Frame
from helios_jax.heliosbench.clip_pixels import clip_pixels
from helios_jax.heliosbench.metric import Clip, Measured, drifted
from helios_jax.heliosbench.model_files import open_weights, openai_names
from helios_jax.heliosbench.vit import PICTURES, Encoder, encode_pictures, normalize
from helios_jax.pretrained.errors import CheckpointError

BATCH = 16  # frames
SCALE = 10.0  # the head's scores go up to about this


class Aesthetic:
    """The metric, with CLIP ViT-L/14 and its head."""

    files = ("aesthetic", "drifting_aesthetic")

    def __init__(self, clip: Path, head: Path):
        tensors = openai_names(open_weights(clip, "visual.", "vision_model.", "visual_projection."))
        self._encoder = Encoder.of(tensors, PICTURES, "visual.", str(clip))
        linear = {key: read() for key, read in open_weights(head, "weight", "bias").items()}
        width = self._encoder.tensors["proj"].shape[1]
        if {key: value.shape for key, value in linear.items()} != {"weight": (1, width), "bias": (1,)}:
            raise CheckpointError(f"{head} is not a head of {width} features: take sa_0_4_vit_l_14_linear")
        self._weight, self._bias = jnp.asarray(linear["weight"][0]), float(linear["bias"][0])
        grid = round((self._encoder.tensors["positional_embedding"].shape[0] - 1) ** 0.5)
        self.side = grid * self._encoder.tensors["conv1.weight"].shape[-1]

    def begin(self, clip: Clip) -> "AestheticMeter":
        return AestheticMeter(self, clip)

    def score(self, pictures: list[np.ndarray]) -> np.ndarray:
        """The scores of normalized pictures [h, w, 3], at most BATCH."""
        batch = np.zeros((BATCH, *pictures[0].shape), np.float32)
        batch[: len(pictures)] = pictures
        features = normalize(encode_pictures(self._encoder, jnp.asarray(batch)))
        scores = jnp.matmul(features, self._weight, precision=jax.lax.Precision.HIGHEST) + self._bias
        return np.asarray(scores)[: len(pictures)] / SCALE


class AestheticMeter:
    """Scores frames in batches."""

    def __init__(self, metric: Aesthetic, clip: Clip):
        self._metric, self._clip = metric, clip
        self._waiting: list[np.ndarray] = []
        self._scores: list[float] = []

    def add(self, frame: Frame) -> None:
        self._waiting.append(clip_pixels(frame.scaled, rounded=False, side=self._metric.side))
        if len(self._waiting) == BATCH:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self._scores += self._metric.score(self._waiting).tolist()
            self._waiting = []

    def finish(self) -> Measured:
        self._flush()
        found: dict = {"aesthetic": {"aesthetic_score": float(np.mean(self._scores))}}
        if self._clip.length == "long":
            start, end = (
                float(np.mean(self._scores[part.start : part.stop])) for part in drift.ends(len(self._scores))
            )
            found["drifting_aesthetic"] = dict(drifted("aesthetic", start, end))
        return Measured(found, list(enumerate(self._scores)))
