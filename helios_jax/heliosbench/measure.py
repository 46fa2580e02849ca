"""Measures one video with all of its metrics in one pass, and keeps a record of it beside the results.

The record of a video is OUT/MODEL/videos/NAME.json, with a strip of frames in NAME.jpg. Each metric's scores stand
there with the settings that made them, so that a later run measures only metrics that are new or have other settings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from helios_jax.heliosbench import drift, result_files
from helios_jax.heliosbench.bench_frames import Frame, Size, count_frames, read_frames
from helios_jax.heliosbench.bench_videos import BenchVideo
from helios_jax.heliosbench.metric import Clip, Metric, MetricError
from helios_jax.heliosbench.rating import SHORT_FRAMES, Length

STRIP = 8  # frames of a strip
STRIP_HEIGHT = 96  # pixels


@dataclass(frozen=True)
class Recipe:
    """The recipe of a metric, for a process that measures: the function that makes it, and the settings to record."""

    name: str
    make: partial
    settings: Mapping[str, Any] = field(default_factory=dict)
    remote: bool = False  # waits for a service: threads measure it, not processes


@dataclass(frozen=True)
class View:
    """The part of a video that is judged, and the size that the metrics see."""

    length: Length = "long"
    box: Size = (384, 640)

    @property
    def limit(self) -> int | None:
        """The most frames that are read."""
        return SHORT_FRAMES if self.length == "short" else None


def record_path(folder: Path, video: BenchVideo) -> Path:
    """The record of a video in a model's folder of results."""
    return folder / "videos" / f"{video.path.stem}.json"


def read_record(folder: Path, video: BenchVideo) -> dict[str, Any]:
    """The record of a video, an empty one if there is none or the file has another content now."""
    path = record_path(folder, video)
    record = result_files.read(path) if path.exists() else {}
    if record.get("file") != video.digest:
        record = {}
    return {
        "id": video.id,
        "video_name": video.path.name,
        "file": video.digest,
        **{key: record.get(key, {}) for key in ("settings", "scores", "curves", "failed")},
        **{key: record[key] for key in ("frames", "size") if key in record},
    }


def is_done(record: Mapping[str, Any], recipe: Recipe) -> bool:
    """True if the record has the metric's scores, made with the same settings or taken from upstream's files."""
    settings = record["settings"].get(recipe.name)
    return settings is not None and (settings == dict(recipe.settings) or "imported" in settings)


def measure(video: BenchVideo, metrics: Mapping[str, Metric], view: View, strip: Path | None) -> dict[str, Any]:
    """The scores and curves of each metric by its name, and `failed`: the error of each metric that gave none.

    Raises ValueError, in one line, for a video that does not decode.
    """
    count = count_frames(video.path)
    clip = Clip(video.prompt, min(count, view.limit or count), view.length)
    meters = {name: metric.begin(clip) for name, metric in metrics.items()}
    failed: dict[str, str] = {}
    shown: list[np.ndarray] = []
    wanted = drift.middles(clip.frames, min(STRIP, clip.frames)) if strip is not None else []
    size: Size = (0, 0)
    for frame in read_frames(video.path, view.box, clip.frames):
        size = frame.source.height, frame.source.width
        for name, meter in meters.items():
            if name not in failed:
                try:
                    meter.add(frame)
                except MetricError as error:
                    failed[name] = str(error)
        if frame.number in wanted:
            shown.append(_small(frame))
    found = {}
    for name, meter in meters.items():
        if name not in failed:
            try:
                found[name] = meter.finish()
            except MetricError as error:
                failed[name] = str(error)
    if strip is not None:
        strip.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.concatenate(shown, 1)).save(strip, quality=80)
    return {
        "frames": clip.frames,
        "size": list(size),
        "scores": {name: one.scores for name, one in found.items()},
        "curves": {name: one.curve for name, one in found.items()},
        "failed": failed,
    }


def keep(record: dict[str, Any], measured: Mapping[str, Any], recipes: Sequence[Recipe]) -> dict[str, Any]:
    """Puts the measurements of `recipes` into the record, and returns it."""
    record |= {key: measured[key] for key in ("frames", "size")}
    for recipe in recipes:
        for part in ("settings", "scores", "curves", "failed"):
            record[part].pop(recipe.name, None)
        if (reason := measured["failed"].get(recipe.name)) is not None:
            record["failed"][recipe.name] = reason
            continue
        record["settings"][recipe.name] = dict(recipe.settings)
        for part in ("scores", "curves"):
            record[part][recipe.name] = measured[part][recipe.name]
    return record


def items(records: Sequence[Mapping[str, Any]], prompts: Mapping[int, str]) -> dict[str, list[dict[str, Any]]]:
    """The items of each result file, as upstream writes them, over the records of all videos."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        for scores in record["scores"].values():
            for metric, fields in scores.items():
                item = {"id": record["id"], "video_name": record["video_name"]}
                if metric.endswith("semantic"):
                    item["prompt"] = prompts[record["id"]]
                found.setdefault(metric, []).append(item | fields)
    return found


def _small(frame: Frame) -> np.ndarray:
    pixels = Image.fromarray(frame.scaled)
    width = max(1, round(pixels.width * STRIP_HEIGHT / pixels.height))
    return np.asarray(pixels.resize((width, STRIP_HEIGHT), Image.Resampling.BOX))
