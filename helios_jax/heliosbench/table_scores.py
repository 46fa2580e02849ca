"""Scores of a model's videos in the form that tables of ablations read (`helios_jax.ablations.scores`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from helios_jax.ablations import scores
from helios_jax.heliosbench import measure
from helios_jax.heliosbench.bench_run import Model
from helios_jax.heliosbench.result_files import SCORES
from helios_jax.sampling.options import WEIGHTS_FPS

SHEET = "sheet.jpg"
SHOWN = 8  # videos of the sheet


def write(model: Model, out: Path) -> None:
    """Writes `out`/scores.json: the metrics that all videos have, their curves, and a sheet of strips."""
    records = [model.records[video.id] for video in model.videos]
    found = [_values(record) for record in records]
    names = [name for name in SCORES if all(name in values for values in found)]
    if not names:
        return  # the run has said which metrics are missing, and why
    videos = [{"id": record["id"]} | {name: values[name] for name in names} for record, values in zip(records, found)]
    strips = [measure.record_path(model.folder, video).with_suffix(".jpg") for video in model.videos[:SHOWN]]
    scores.write(out, videos, _seconds(records), SHEET if _write_sheet(strips, out / SHEET) else None)


def _values(record: Mapping[str, Any]) -> dict[str, float]:
    """The score of each metric of a video, under the name of its result file."""
    return {name: fields[SCORES[name]] for one in record["scores"].values() for name, fields in one.items()}


def _seconds(records: Sequence[Mapping[str, Any]]) -> dict[str, list[list[float]]]:
    """Curves that have values in each second of each video, as means over the seconds."""
    found = {}
    for name in records[0]["curves"]:
        each = [_by_second(record["curves"].get(name, [])) for record in records]
        if all(each) and len({len(one) for one in each}) == 1:
            found[name] = each
    return found


def _by_second(curve: Sequence[Sequence[float]]) -> list[float]:
    """The mean of a curve in each second; empty if a second has no value."""
    seconds: dict[int, list[float]] = {}
    for frame, value in curve:
        seconds.setdefault(int(frame // WEIGHTS_FPS), []).append(value)
    return [float(np.mean(seconds[i])) for i in range(len(seconds))] if set(seconds) == {*range(len(seconds))} else []


def _write_sheet(strips: Sequence[Path], path: Path) -> bool:
    """Writes the strips below one another; False if there is none."""
    pictures = [Image.open(strip) for strip in strips if strip.is_file()]
    if not pictures:
        return False
    sheet = Image.new("RGB", (max(one.width for one in pictures), sum(one.height for one in pictures)))
    top = 0
    for one in pictures:
        sheet.paste(one, (0, top))
        top += one.height
    sheet.save(path, quality=80)
    return True
