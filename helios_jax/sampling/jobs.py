"""The videos of one run of sample.py: one, several seeds of one, or all rows of a CSV file."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from helios_jax.config import ConfigError, to_dict
from helios_jax.locations import is_remote, location
from helios_jax.media.writers import Format, file_format, read_sidecar, sidecar
from helios_jax.sampling import table
from helios_jax.sampling.chunk_frames import ChunkFrames
from helios_jax.sampling.download import is_url
from helios_jax.sampling.fingerprint import content_hash
from helios_jax.sampling.options import PromptSwitch, SampleConfig

# Fields that say where a video goes; all others say what is in it.
ELSEWHERE = (
    *("csv", "ids", "interpolate_time", "naming", "num_videos_per_prompt"),
    *("out", "format", "overwrite", "state", "resume", "profile", "ray", "ray_worker"),
)
# Fields that may differ for the same video: paths, whose content is compared, and where the text encoder is kept.
NOT_COMPARED = ("model", "transformer", "loras", "image", "video", "offload_text_encoder")


@dataclass(frozen=True)
class Job:
    """One video: its `name` in messages, its whole config, and the path of its file.

    `weights` has hashes of the files of the checkpoint and of the LoRAs, by name.
    """

    name: str
    config: SampleConfig
    out: Path
    weights: Mapping[str, Any] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """The settings that say what is in the video, as its sidecar has them."""
        return {key: value for key, value in to_dict(self.config).items() if key not in ELSEWHERE}

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """Hashes of the files that decide the video, as its sidecar has them; None for an input that is gone."""
        named = {"image": self.config.image, "video": self.config.video}
        return dict(self.weights) | {key: content_hash(name) for key, name in named.items() if name is not None}

    def differs(self, facts: Mapping[str, Any]) -> list[str]:
        """Names of the settings and inputs that decide the video and differ from those in `facts`, a file's sidecar."""
        theirs, inputs = facts.get("settings"), facts.get("inputs")
        theirs, inputs = (value if isinstance(value, dict) else {} for value in (theirs, inputs))
        names = [key for key, ours in self.settings().items() if key not in NOT_COMPARED and ours != theirs.get(key)]
        names += [key for key in ("image", "video") if (getattr(self.config, key) is None) != (theirs.get(key) is None)]
        return names + [
            key
            for key, ours in self.inputs.items()
            if ours is not None and ours != inputs.get(key) and key not in names
        ]

    def done(self) -> bool:
        """True if the sidecar says that the video is whole; raises ConfigError when it was made with other settings."""
        facts = read_sidecar(self.out)
        if facts is None or not facts.get("complete") or not self.out.exists():
            return False
        if differs := self.differs(facts):
            raise ConfigError(
                f"{self.out}: is there already, made with other settings ({', '.join(differs)}): choose another out,"
                f" or remove it and {sidecar(self.out).name}"
            )
        return True


def make_jobs(config: SampleConfig, frames: ChunkFrames, weights: Mapping[str, Any] | None = None) -> list[Job]:
    """All videos of a run, in order; `frames` are the numbers of frames of chunks, `weights` those of each `Job`.

    Raises ConfigError for a CSV that cannot be read or an `out` that does not fit.
    """
    if config.csv is None:
        kind = file_format(config.out, config.format)
        names = [("video", "", config)]
    else:
        kind = config.format or "mp4"
        if location(config.out).suffix:
            raise ConfigError(f"out: {config.out} must be a folder for the videos of {config.csv}, without a suffix")
        names = [(f"id {row}", row, one) for row, one in _rows(config, frames)]
    return [
        Job(
            name if config.num_videos_per_prompt == 1 else f"{name}, seed {one.seed + i}",
            dataclasses.replace(one, seed=one.seed + i),
            _out(config, one, row, one.seed + i, kind),
            weights or {},
        )
        for name, row, one in names
        for i in range(config.num_videos_per_prompt)
    ]


def _out(config: SampleConfig, one: SampleConfig, row: str, seed: int, kind: Format) -> Path:
    """The path of a video's file: `config` is the run's, `one` and `row` are the config and the id of the video."""
    several = f"_seed{seed}" if config.num_videos_per_prompt > 1 else ""
    suffix = "" if kind == "png" else f".{kind}"
    if config.csv is None:
        path = location(config.out)
        return path.with_name(f"{path.stem}{several}{suffix}")
    if config.naming == "heliosbench":
        if several:
            raise ConfigError("naming: heliosbench has one video per prompt; set num_videos_per_prompt to 1")
        if not row.isdecimal():
            raise ConfigError(
                f"naming: heliosbench names videos by whole numbers, and id {row} is none: number the rows of the csv,"
                " or leave naming out"
            )
        return location(config.out) / f"{row}_{one.num_frames}_ori{one.num_frames}{suffix}"
    return location(config.out) / f"{row}{several}{suffix}"


def _rows(config: SampleConfig, frames: ChunkFrames) -> Iterator[tuple[str, SampleConfig]]:
    """Each video of the CSV: its id and its config."""
    assert config.csv is not None
    videos = {rows[0].fields["id"]: rows for rows in table.read(location(config.csv))}
    if config.ids is not None:
        if missing := set(config.ids) - set(videos):
            raise ConfigError(f"ids: {config.csv} has no id {sorted(missing)[0]}")
        videos = {name: rows for name, rows in videos.items() if name in config.ids}
    for name, rows in videos.items():
        try:
            yield name, _video_config(config, rows, frames)
        except ConfigError:
            raise
        except ValueError as error:
            raise rows[0].error(f"id {name}: {error}") from None


def _length(row: table.Row) -> int | None:
    """The number of frames that a row asks for: its num_frames, also under the name duration."""
    frames, duration = row.number("num_frames"), row.number("duration")
    if None not in (frames, duration) and frames != duration:
        raise ValueError(f"num_frames {frames} and duration {duration} both mean frames and differ; leave either empty")
    return duration if frames is None else frames


def _video_config(config: SampleConfig, rows: list[table.Row], frames: ChunkFrames) -> SampleConfig:
    """The config of one video of the CSV; with several `rows`, its prompt switches from row to row."""
    first = rows[0]
    prompts = [row.get("refined_prompt", "prompt") for row in rows]
    given: dict[str, Any] = {
        name: value if is_url(value) or is_remote(value) else str(first.path.parent / value)
        for column, name in table.INPUTS.items()
        if (value := first.get(column))
    }
    if first.get("negative_prompt"):
        given["negative_prompt"] = first.get("negative_prompt")
    if (seed := first.number("seed")) is not None:
        given["seed"] = seed
    asked = _length(first)
    length = config.num_frames if asked is None else asked
    if len(rows) > 1:
        if config.switches:
            raise ValueError(
                "switches (--then) are of videos with one prompt, this one has several rows; give rows or switches"
            )
        for row in rows[1:]:
            for column, value in row.fields.items():
                if column not in table.OF_PROMPTS and value not in ("", first.get(column)):
                    raise row.error(f"{column} of a video is that of its first prompt; leave it empty here")
        each = config.interpolate_time
        given["switches"] = [PromptSwitch(prompt, chunk=(i + 1) * each) for i, prompt in enumerate(prompts[1:])]
        if asked is None:
            length = max(length or 0, frames.before(len(prompts) * each))
    if length is None:
        raise ValueError("num_frames must be a number: the next video would never begin")
    alone = {"csv": None, "ids": None, "naming": "id", "ray": None}
    return dataclasses.replace(config, prompt=prompts[0], num_frames=length, **alone, **given)
