"""Semantic score: ViCLIP's similarity of a prompt's first 32 tokens and 8 frames, and its drift."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from helios_jax.heliosbench import drift
from helios_jax.heliosbench.bench_frames import Frame
from helios_jax.heliosbench.clip_pixels import clip_pixels
from helios_jax.heliosbench.clip_text import ClipTokenizer
from helios_jax.heliosbench.metric import Clip, Measured, drifted
from helios_jax.heliosbench.model_files import open_weights
from helios_jax.heliosbench.vit import TEXTS, VIDEOS, Encoder, encode_texts, encode_video, normalize


class Semantic:
    """The metric, with ViCLIP-L/14 and CLIP's vocabulary."""

    files = ("semantic", "drifting_semantic")

    def __init__(self, viclip: Path, vocabulary: Path):
        self._tokenizer = ClipTokenizer(vocabulary)
        tensors = open_weights(viclip, "vision_encoder.", "text_encoder.")
        self._texts = Encoder.of(tensors, TEXTS, "text_encoder.", str(viclip))
        self._videos = Encoder.of(tensors, VIDEOS, "vision_encoder.", str(viclip))
        w = self._videos.tensors
        self.frames = w["temporal_positional_embedding"].shape[1]
        self.side = round((w["positional_embedding"].shape[0] - 1) ** 0.5) * w["conv1.weight"].shape[-1]

    def begin(self, clip: Clip) -> "SemanticMeter":
        return SemanticMeter(self, clip)

    def likeness(self, prompt: str, pictures: list[list[np.ndarray]]) -> list[float]:
        """The cosine similarity of a prompt and each list of `self.frames` normalized pictures."""
        length = self._texts.tensors["positional_embedding"].shape[0]
        text = normalize(encode_texts(self._texts, jnp.asarray(self._tokenizer(prompt, length))[None]))[0]
        videos = (normalize(encode_video(self._videos, jnp.asarray(np.stack(several)))) for several in pictures)
        return [float(jnp.dot(video, text, precision="highest")) for video in videos]


class SemanticMeter:
    """Collects the frames that ViCLIP sees."""

    def __init__(self, metric: Semantic, clip: Clip):
        self._metric, self._clip = metric, clip
        self._samples = [drift.middles(clip.frames, metric.frames)]
        if clip.length == "long":
            self._samples += drift.sampled_ends(clip.frames, metric.frames)
        self._wanted = {number for sample in self._samples for number in sample}
        self._pictures: dict[int, np.ndarray] = {}

    def add(self, frame: Frame) -> None:
        if frame.number in self._wanted:
            self._pictures[frame.number] = clip_pixels(frame.scaled, rounded=True, side=self._metric.side)

    def finish(self) -> Measured:
        pictures = [[self._pictures[number] for number in sample] for sample in self._samples]
        scores = self._metric.likeness(self._clip.prompt, pictures)
        found: dict = {"semantic": {"semantic_score": scores[0]}}
        if len(scores) > 1:
            found["drifting_semantic"] = dict(drifted("semantic", *scores[1:]))
        places = (sum(sample) / len(sample) for sample in self._samples)
        return Measured(found, sorted(zip(places, scores)))
