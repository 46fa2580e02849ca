"""Datasets that take long to make: written shard by shard, so that a process that dies loses at most one shard.

The whole dataset is planned first: its items in a fixed order, cut into shards. A complete shard is a file under its
final name, and a manifest. A later run makes the shards without a manifest. A shard depends on its items alone, so the
result equals that of an uninterrupted run, and several hosts can share the shards. `NAME.partial` holds the dataset
until the last shard is done; then it becomes `NAME`.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from helios_jax.data import records
from helios_jax.locations import is_remote, location, replacing

MANIFESTS, REJECTED = "shards", "rejected.jsonl"


Tick = Callable[[], None]


@dataclass(frozen=True)
class Rejected:
    """An item that gives no example, and the reason."""

    id: str
    reason: str

    def show(self) -> None:
        print(f"skipped {self.id}: {self.reason}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Shard:
    """Some items of a split, whose examples have the sizes of one bucket ("": no buckets)."""

    split: str
    index: int
    bucket: str
    items: tuple[Any, ...]

    @property
    def name(self) -> str:
        return f"{self.split}-{self.index:05d}"


# Makes a shard's items in order: the examples of each, or the reason for none.
Make = Callable[[Sequence[Any]], Iterable[Sequence[records.Example] | Rejected]]


def plan(split: str, buckets: Mapping[str, Sequence[Any]], size: int) -> list[Shard]:
    """Shards of at most `size` items, bucket by bucket."""
    parts = [
        (bucket, tuple(items[i : i + size]))
        for bucket, items in sorted(buckets.items())
        for i in range(0, len(items), size)
    ]
    return [Shard(split, index, bucket, items) for index, (bucket, items) in enumerate(parts)]


class Build:
    """A dataset that is being made, begun by this run or by an earlier one.

    `settings`, ready for JSON, and the items determine the examples. `rejected` are items that were refused before the
    plan was made. Host `host` of `hosts` makes every `hosts`-th shard. With `complete`, `out` is this dataset already.
    Raises FileExistsError if `out` is anything else, and ValueError if the unfinished dataset has other settings or if
    there are no items.
    """

    def __init__(
        self,
        out: Path,
        features: Mapping[str, Any],
        shards: Sequence[Shard],
        settings: Mapping[str, Any],
        *,
        rejected: Sequence[Rejected] = (),
        host: int = 0,
        hosts: int = 1,
    ):
        self.folder = records.partial_folder(out)
        if not 0 <= host < hosts:
            raise ValueError(f"shard {host} is not one of {hosts}: the first is 0, the last {hosts - 1}")
        if not shards:
            reason = f"; the first: {rejected[0].id}: {rejected[0].reason}" if rejected else ""
            raise ValueError(f"{out}: there is nothing to make, {len(rejected)} items were refused{reason}")
        self.out = out
        self.shards = tuple(shards)
        self._features = tfds.features.FeaturesDict(dict(features))
        self._mine = self.shards[host::hosts]
        self._rejected = tuple(rejected)
        facts = self._facts(settings)
        planned, finished = (out / records.PLAN).is_file(), (out / "dataset_info.json").is_file()
        self.complete = planned and finished and json.loads((out / records.PLAN).read_text()) == facts
        if not self.complete:
            if finished or not (self.folder == out and planned):
                records.check_free(out)
            self._begin(facts)

    def _facts(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The settings and the items, by which the dataset is known; equal to what JSON gives back."""
        items = hashlib.sha256()
        for shard in self.shards:
            items.update(json.dumps(shard.items, default=vars).encode())
        names = [f"{shard.name} {shard.bucket}".strip() for shard in self.shards]
        return json.loads(json.dumps({**settings, "shards": names, "items": items.hexdigest()}))

    def _begin(self, facts: Mapping[str, Any]) -> None:
        """Makes the folder and writes the plan, or compares it with the one that is there."""
        (self.folder / MANIFESTS).mkdir(parents=True, exist_ok=True)
        path = self.folder / records.PLAN
        if not path.is_file():
            _write(path, json.dumps(facts, indent=2))
        begun = json.loads(path.read_text())
        if begun != facts:
            differ = [key for key in facts if begun.get(key) != facts[key]]
            raise ValueError(
                f"{self.folder} was begun with other arguments or inputs ({', '.join(differ)} differ): repeat the "
                "command that it was begun with, or delete it"
            )
        if not is_remote(self.folder):
            self._rename()

    def _rename(self) -> None:
        """Names shards as `shard_template` does now: older versions gave some datasets a name that TFDS refuses."""
        ours = {name.partition("-")[2]: name for name in (self._path(shard).name for shard in self.shards)}
        for file in self.folder.glob("*.array_record-*"):
            name = ours.get(file.name.partition("-")[2], file.name)
            if name != file.name:
                with suppress(FileNotFoundError):  # another host was faster
                    file.rename(file.with_name(name))

    def has(self, name: str) -> bool:
        """True if `save` was called for the file `name`."""
        return (self.folder / name).is_file()

    def save(self, name: str, array: np.ndarray) -> None:
        """Writes `array` to a file beside the records."""
        with _made(self.folder / name) as part, part.open("wb") as file:
            np.save(file, array)

    @property
    def pending(self) -> list[Shard]:
        """This host's shards that are not done yet."""
        return [shard for shard in self._mine if not self.done(shard)]

    def done(self, shard: Shard) -> bool:
        return self._manifest(shard) is not None

    def write(self, shard: Shard, made: Iterable[Sequence[records.Example] | Rejected], tick: Tick) -> list[Rejected]:
        """Writes the results of a shard's items, calls `tick` after each, and returns those that give no example."""
        path = self._path(shard)
        count = size = 0
        rejected: list[Rejected] = []
        with _made(path) as part:
            writer = ArrayRecordWriter(str(part), records.WRITER_OPTIONS)
            try:
                for item in made:
                    if isinstance(item, Rejected):
                        rejected.append(item)
                        item.show()
                    else:
                        for example in item:
                            record = records.serialize(self._features, example)
                            writer.write(record)
                            count += 1
                            size += len(record)
                    tick()
            finally:
                writer.close()
            with part.open("rb") as file:  # the manifest must not reach the disk before its shard
                os.fsync(file.fileno())
        facts = {"records": count, "bytes": size, "file": path.stat().st_size, "rejected": [*map(vars, rejected)]}
        _write(self.folder / MANIFESTS / f"{shard.name}.json", json.dumps(facts))
        return rejected

    def finish(self) -> dict[str, Any] | None:
        """Completes the dataset if all shards of all hosts are done, and returns its figures; else None.

        Several hosts may call it at once. Raises ValueError when a split has no example.
        """
        try:
            return self._finish()
        except FileNotFoundError:
            if self.out.is_dir():
                return None  # another host completed it
            raise

    def missing(self) -> list[str]:
        """Names of the shards of all hosts that are not done."""
        return [shard.name for shard in self.shards if not self.done(shard)]

    def _finish(self) -> dict[str, Any] | None:
        manifests = [self._manifest(shard) for shard in self.shards]
        done = [manifest for manifest in manifests if manifest is not None]
        if len(done) < len(manifests):
            return None
        refused = [*map(vars, self._rejected), *(r for manifest in done for r in manifest["rejected"])]
        infos, buckets = [], {}
        for split in dict.fromkeys(shard.split for shard in self.shards):
            of_split = [(s, m) for s, m in zip(self.shards, done) if s.split == split]
            counts: dict[str, int] = {}
            for shard, manifest in of_split:
                counts[shard.bucket] = counts.get(shard.bucket, 0) + manifest["records"]
            buckets[split] = [[bucket, count] for bucket, count in counts.items() if count]
            if not buckets[split]:
                first = f"{refused[0]['id']}: {refused[0]['reason']}"
                raise ValueError(f"{self.folder}: no item of {split} could be used; {len(refused)} refused: {first}")
            infos.append(
                tfds.core.SplitInfo(
                    name=split,
                    shard_lengths=[manifest["records"] for _, manifest in of_split],
                    num_bytes=sum(manifest["bytes"] for _, manifest in of_split),
                    filename_template=records.shard_template(self.folder, self.out.name, split),
                )
            )
        _write(self.folder / REJECTED, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in refused))
        _write(self.folder / records.BUCKETS, json.dumps(buckets))
        records.write_metadata(self.folder, self._features, infos)
        if self.folder != self.out:
            for left in self.folder.rglob(".*"):
                left.unlink(missing_ok=True)
            if self.out.is_dir():
                self.out.rmdir()  # checked to be empty
            os.rename(self.folder, self.out)
        return {
            "records": sum(manifest["records"] for manifest in done),
            "rejected": len(refused),
            "bytes": sum(manifest["bytes"] for manifest in done),
        }

    def _path(self, shard: Shard) -> Path:
        template = records.shard_template(self.folder, self.out.name, shard.split)
        total = sum(other.split == shard.split for other in self.shards)
        return location(template.sharded_filepath(shard_index=shard.index, num_shards=total))

    def _manifest(self, shard: Shard) -> dict[str, Any] | None:
        """Reads a shard's manifest; None unless the shard's file exists with the manifest's size."""
        try:
            manifest = json.loads((self.folder / MANIFESTS / f"{shard.name}.json").read_text())
            return manifest if self._path(shard).stat().st_size == manifest["file"] else None
        except FileNotFoundError:
            return None


def run(build: Build, make: Make, unit: str, *, every: float = 10.0) -> None:
    """Makes this host's pending shards one after another, and completes the dataset if no shard is missing.

    Prints a progress line every `every` seconds and a line of figures at the end; `unit` names the items.
    """
    pending = begin(build)
    total = sum(len(shard.items) for shard in pending)
    done, start, last = 0, time.monotonic(), time.monotonic()

    def tick() -> None:
        nonlocal done, last
        done += 1
        if (now := time.monotonic()) - last > every:
            last, rate = now, done / (now - start)
            print(f"{done}/{total} {unit}  {rate:.2f} {unit}/s  {_clock((total - done) / rate)} left", flush=True)

    for shard in pending:
        build.write(shard, make(shard.items), tick)
    complete(build, total, unit, time.monotonic() - start)


def begin(build: Build) -> list[Shard]:
    """This host's pending shards; prints how many of all shards are done or belong to other hosts."""
    pending = build.pending
    others = len(build.shards) - len(pending)
    if others:
        print(f"{build.folder}: {others} of {len(build.shards)} shards are done or another host's", flush=True)
    return pending


def complete(build: Build, total: int, unit: str, seconds: float) -> None:
    """Completes the dataset if no shard is missing, and prints the figures of the `total` items made in `seconds`."""
    figures = f"{total} {unit} in {_clock(seconds)}, {total / max(seconds, 1e-9):.2f} {unit}/s"
    if (held := build.finish()) is not None:
        print(
            f"{build.out}: {held['records']} records, {held['bytes'] / 1e9:.2f} GB, {held['rejected']} {unit} skipped "
            f"({REJECTED}); here {figures}",
            flush=True,
        )
    elif not (build.out / "dataset_info.json").is_file() and (missing := build.missing()):
        print(
            f"{build.folder}: {figures}; {len(missing)} shards of other hosts are missing, the first {missing[0]}: "
            "when all are in this folder, run the command once more",
            flush=True,
        )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def _part(path: Path) -> Path:
    """The hidden name, unique to this process, of a file that is being written; datasets have no hidden files."""
    return path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")


@contextmanager
def _made(path: Path) -> Iterator[Path]:
    """A local path to write to, which becomes `path` at the end; several hosts may write the same."""
    if is_remote(path):
        with replacing(path) as part:
            yield part
    else:
        part = _part(path)
        yield part
        part.replace(path)


def _write(path: Path, text: str) -> None:
    with _made(path) as part:
        # Half a character, which JSON and file names can hold, is written as an escape.
        part.write_text(text, encoding="utf-8", errors="backslashreplace")
