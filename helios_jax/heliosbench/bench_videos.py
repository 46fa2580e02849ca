"""The benchmark's videos: files named `{id}_{target frames}_ori{true frames}.mp4`, and the prompts of their ids."""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from helios_jax.config import ConfigError
from helios_jax.sampling import table
from helios_jax.sampling.fingerprint import file_hash

NAME = re.compile(r"(\d+)_.*_ori\d*.*\.mp4")
EXAMPLE = "2_240_ori264.mp4"


@dataclass(frozen=True)
class BenchVideo:
    """A video file and its prompt."""

    path: Path
    id: int
    prompt: str

    @cached_property
    def digest(self) -> str:
        """A hash of the file, as it was when first asked for."""
        return file_hash(self.path)


def read_prompts(path: Path) -> dict[int, str]:
    """The prompts of a CSV by their ids; raises ConfigError for one that cannot be read, and for an id like a4."""
    prompts = {}
    for first, *_ in table.read(path):
        if not first.fields["id"].isdecimal():
            raise first.error(
                f"id {first.fields['id']} must be a whole number: videos are named by it, as {EXAMPLE} is"
            )
        prompts[int(first.fields["id"])] = first.get("prompt", "refined_prompt")
    return prompts


def find_videos(folder: Path, prompts: dict[int, str]) -> tuple[list[BenchVideo], list[str]]:
    """The videos of a folder by id, and a line for each that is left out.

    Raises ConfigError for a folder without any, and for two videos of one id.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: is no folder; name one with videos such as {EXAMPLE}")
    videos: dict[int, BenchVideo] = {}
    left_out = []
    for path in sorted(folder.glob("*.mp4")):
        found = NAME.fullmatch(path.name)
        number = int(found[1]) if found else None
        if number is None:
            left_out.append(f"{path.name}: its name is not of the form of {EXAMPLE}")
        elif number not in prompts:
            left_out.append(f"{path.name}: the prompts have no id {number}")
        elif number in videos:
            raise ConfigError(f"{path}: {videos[number].path.name} has id {number}, too; keep one of them")
        else:
            videos[number] = BenchVideo(path, number, prompts[number])
    if not videos:
        reason = f" ({left_out[0]})" if left_out else ""
        raise ConfigError(
            f"{folder}: holds no video to judge{reason}; `sample.py --naming heliosbench` names them as {EXAMPLE}"
        )
    return [videos[number] for number in sorted(videos)], left_out
