"""Reads the file of a run of many videos: a CSV with a row per video or prompt, or a text file with a prompt a line."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from helios_jax.config import ConfigError, did_you_mean

COLUMNS = ("id", "prompt_index", "prompt", "refined_prompt", "negative_prompt", "seed", "num_frames", "duration")
OF_PROMPTS = COLUMNS[:4]  # which differ from row to row of one video
INPUTS = {"image": "image", "image_name": "image", "video": "video", "video_name": "video"}
LONGEST_ID = 200  # bytes: a file's name has 255, of which suffixes and seeds take some


@dataclass(frozen=True)
class Row:
    """A row: the line that it begins in, and its fields by column, without the spaces around them."""

    path: Path
    line: int
    fields: dict[str, str]

    def get(self, *columns: str) -> str:
        """The first of `columns` that is not empty, else an empty string."""
        return next((self.fields[name] for name in columns if self.fields.get(name)), "")

    def number(self, column: str) -> int | None:
        """A whole number, also as pandas and Excel write it (42.0); None where the field is empty."""
        text = self.get(column)
        if not text:
            return None
        whole = text.partition(".")[0] if text.rstrip("0").endswith(".") else text
        try:
            return int(whole)
        except ValueError:
            raise self.error(f"{column} must be a whole number, got {text!r}") from None

    def error(self, text: str) -> ConfigError:
        """An error that names the file and the line."""
        return ConfigError(f"csv: {self.path}, line {self.line}: {text}")


def read(path: Path) -> list[list[Row]]:
    """The rows of each video, in the file's order, or sorted by id if a column prompt_index allows several rows of one.

    Raises ConfigError, in one line, for a file that cannot be read, and for a row that would be cut or lost: a field
    too many, an id or a prompt_index that occurs twice.
    """
    rows = list(_lines(path) if path.suffix.lower() == ".txt" else _table(path))
    if not rows:
        raise ConfigError(f"csv: {path} holds no row")
    for row in rows:
        name = row.fields["id"]
        if name in ("", "..") or Path(name).name != name or not name.isprintable():
            raise row.error(f"id {name!r} cannot be part of a file's name; use letters and digits")
        if len(name.encode()) > LONGEST_ID:
            raise row.error(f"id {name[:20]}... is longer than {LONGEST_ID} bytes; a file has its name")
    videos: dict[str, list[Row]] = {}
    interactive = "prompt_index" in rows[0].fields
    for row in sorted(rows, key=_place) if interactive else rows:
        videos.setdefault(row.fields["id"], []).append(row)
    for name, several in videos.items():
        for one, other in pairwise(several):
            if not interactive:
                raise other.error(f"id {name} is that of line {one.line}, too; ids must differ")
            if one.number("prompt_index") == other.number("prompt_index"):
                raise other.error(f"id {name} has the prompt_index of line {one.line}, too; they must differ")
    return list(videos.values())


def _place(row: Row) -> tuple[int, int, str, int]:
    """The sorting key of a row: numeric ids by number, then other ids; within a video, rows by prompt_index."""
    index = row.number("prompt_index")
    if index is None:
        raise row.error("prompt_index is empty; number the prompts of a video")
    name = row.fields["id"]
    return (0, int(name), "", index) if name.isdecimal() else (1, 0, name, index)


def _lines(path: Path) -> Iterator[Row]:
    texts = [line.strip() for line in _text(path).split("\n")]
    prompts = [(line, text) for line, text in enumerate(texts, 1) if text]
    for i, (line, text) in enumerate(prompts):
        yield Row(path, line, {"id": str(i), "prompt": text})


def _table(path: Path) -> Iterator[Row]:
    lines = _text(path).split("\n")
    reader = csv.reader((f"{line}\n" for line in lines), strict=True)
    records = _records(path, reader)
    names = [name.strip().lower() for name in next(records, (1, [""]))[1]]
    _check_names(path, names)
    number = 0
    for line, values in records:
        values = [value.strip() for value in values]
        if not any(values):  # spreadsheets write such rows at the end
            continue
        row = Row(path, line, {"id": str(number), **dict(zip(names, values))})
        if any(values[len(names) :]):
            raise row.error(f"{len(values)} fields for {len(names)} columns; put quotes around a text with commas")
        number += 1
        yield row


def _text(path: Path) -> str:
    try:
        if not path.is_file():
            raise ConfigError(f"csv: {path} is no file")
        with path.open(newline="", encoding="utf-8-sig") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ConfigError(f"csv: {path} is not in UTF-8 (byte {error.start}); save it in that encoding") from None
    except OSError as error:
        raise ConfigError(f"csv: {path} cannot be read: {error}") from None


def _records(path: Path, reader: Any) -> Iterator[tuple[int, list[str]]]:
    """Each record and the line that it begins in."""
    begin = 1
    try:
        for record in reader:
            yield begin, record
            begin = reader.line_num + 1
    except csv.Error as error:
        raise ConfigError(f"csv: {path}, line {begin}: {error}; is a quote not closed?") from None


def _check_names(path: Path, names: list[str]) -> None:
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ConfigError(f"csv: {path} has two columns {name!r}; leave one out")
        if name not in (*COLUMNS, *INPUTS):
            separator = next((mark for mark in (";", "\t") if mark in name), None)
            if separator is not None:
                raise ConfigError(f"csv: {path} has {separator!r} between its columns; write commas")
            raise ConfigError(f"csv: {path} has a column {name!r} that means nothing here{did_you_mean(name, COLUMNS)}")
    if not {"prompt", "refined_prompt"} & set(names):
        raise ConfigError(f"csv: {path} has no column prompt; it has {', '.join(names) or 'none'}")
