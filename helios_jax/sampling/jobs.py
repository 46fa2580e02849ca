"""The videos of one run of sample.py: one, several seeds of one, or all rows of a CSV file."""

import csv
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from helios_jax.config import ConfigError, nearest, to_dict
from helios_jax.media.writers import Format, file_format, read_sidecar, sidecar
from helios_jax.sampling.options import PromptSwitch, SampleConfig

COLUMNS = ("id", "prompt_index", "prompt", "refined_prompt", "negative_prompt", "seed", "num_frames", "duration")
INPUTS = {"image": "image", "image_name": "image", "video": "video", "video_name": "video"}
# Fields that say where a video goes; all others decide what is in it.
ELSEWHERE = ("csv", "ids", "interpolate_time", "naming", "num_videos_per_prompt", "out", "format", "state", "resume")


@dataclass(frozen=True)
class Job:
    """One video: its `name` in messages, its whole config, and the path of its file."""

    name: str
    config: SampleConfig
    out: Path

    def settings(self) -> dict[str, Any]:
        """The settings that decide the video, as its sidecar has them."""
        return {key: value for key, value in to_dict(self.config).items() if key not in ELSEWHERE}

    def done(self) -> bool:
        """True if the sidecar says that the video is whole; raises ConfigError when it was made with other settings."""
        facts = read_sidecar(self.out)
        if facts is None or not facts.get("complete") or not self.out.exists():
            return False
        ours, theirs = self.settings(), facts.get("settings", {})
        if differs := [key for key in ours if ours[key] != theirs.get(key)]:
            raise ConfigError(
                f"{self.out}: is there already, made with other settings ({', '.join(differs)}): choose another out,"
                f" or remove it and {sidecar(self.out).name}"
            )
        return True


def make_jobs(config: SampleConfig, chunk_frames: int) -> list[Job]:
    """All videos of a run, in order; `chunk_frames` are the pixel frames of a chunk.

    Raises ConfigError for a CSV that cannot be read or an `out` that does not fit.
    """
    if config.csv is None:
        kind = file_format(config.out, config.format)
        names = [("video", "", config)]
    else:
        kind = config.format or "mp4"
        if Path(config.out).suffix:
            raise ConfigError(f"out: {config.out} must be a folder for the videos of {config.csv}, without a suffix")
        names = [(f"id {row}", row, one) for row, one in _rows(config, chunk_frames)]
    return [
        Job(
            name if config.num_videos_per_prompt == 1 else f"{name}, seed {one.seed + i}",
            dataclasses.replace(one, seed=one.seed + i),
            _out(config, one, row, one.seed + i, kind),
        )
        for name, row, one in names
        for i in range(config.num_videos_per_prompt)
    ]


def _out(config: SampleConfig, one: SampleConfig, row: str, seed: int, kind: Format) -> Path:
    several = f"_seed{seed}" if config.num_videos_per_prompt > 1 else ""
    suffix = "" if kind == "png" else f".{kind}"
    if config.csv is None:
        path = Path(config.out)
        return path.with_name(f"{path.stem}{several}{suffix}")
    if config.naming == "heliosbench":
        if several:
            raise ConfigError("naming: heliosbench has one video per prompt; set num_videos_per_prompt to 1")
        return Path(config.out) / f"{row}_{one.num_frames}_ori{one.num_frames}{suffix}"
    return Path(config.out) / f"{row}{several}{suffix}"


def _rows(config: SampleConfig, chunk_frames: int) -> Iterator[tuple[str, SampleConfig]]:
    """Each video of the CSV: its id and its config."""
    assert config.csv is not None
    path = Path(config.csv)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            names = list(reader.fieldnames or [])
            rows = [{"id": str(i), **row} for i, row in enumerate(reader)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"csv: {path} cannot be read: {error}") from None
    if unknown := [name for name in names if name not in (*COLUMNS, *INPUTS)]:
        raise ConfigError(
            f"csv: {path} has a column {unknown[0]!r} that means nothing here{nearest(unknown[0], COLUMNS)}"
        )
    if not {"prompt", "refined_prompt"} & set(names):
        raise ConfigError(f"csv: {path} has no column prompt; it has {', '.join(names) or 'none'}")
    interactive = "prompt_index" in names
    if interactive:
        rows.sort(key=lambda row: (_order(row["id"]), _number(path, row, "prompt_index", int)))
    groups = [(row, list(group)) for row, group in groupby(rows, key=lambda row: row["id"])]
    for row, group in groups:
        if not row.strip() or Path(row).name != row:
            raise ConfigError(f"csv: {path}: id {row!r} cannot be part of a file's name; use letters and digits")
        if len(group) > 1 and not interactive:
            raise ConfigError(f"csv: {path}: id {row} stands in {len(group)} rows; ids must differ")
    if config.ids is not None:
        if missing := set(config.ids) - {row for row, _ in groups}:
            raise ConfigError(f"ids: {path} has no id {sorted(missing)[0]}")
        groups = [(row, group) for row, group in groups if row in config.ids]
    if not groups:
        raise ConfigError(f"csv: {path} holds no row")
    for row, group in groups:
        try:
            yield row, _one(config, path, group, chunk_frames)
        except ValueError as error:
            raise ConfigError(f"csv: {path}: id {row}: {error}") from None


def _one(config: SampleConfig, path: Path, group: list[dict[str, Any]], chunk_frames: int) -> SampleConfig:
    first = group[0]
    prompts = [row.get("refined_prompt") or row.get("prompt") or "" for row in group]
    given: dict[str, Any] = {
        name: str(path.parent / first[column]) for column, name in INPUTS.items() if first.get(column)
    }
    if first.get("negative_prompt"):
        given["negative_prompt"] = first["negative_prompt"]
    if first.get("seed"):
        given["seed"] = _number(path, first, "seed", int)
    for column in ("num_frames", "duration"):
        if first.get(column):
            given["num_frames"] = _number(path, first, column, int)
    if len(group) > 1:
        length = config.interpolate_time
        given["switches"] = [PromptSwitch(prompt, chunk=(i + 1) * length) for i, prompt in enumerate(prompts[1:])]
        given["num_frames"] = len(prompts) * length * chunk_frames
    return dataclasses.replace(config, prompt=prompts[0], csv=None, ids=None, naming="id", **given)


def _number(path: Path, row: dict[str, Any], column: str, kind: type) -> Any:
    try:
        return kind(row[column])
    except ValueError:
        raise ConfigError(f"csv: {path}: id {row['id']}: {column} must be a number, got {row[column]!r}") from None


def _order(row: str) -> tuple[int, int | str]:
    """Numbers in their order, then words."""
    return (0, int(row)) if row.isdigit() else (1, row)
