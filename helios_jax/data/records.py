"""Datasets on disk: TFDS folders of array_record files, written and read without TensorFlow.

`write` streams examples into a folder, and `open_source` returns a random-access sequence for Grain.
`helios_jax.data.shards` writes datasets that take long, and can be interrupted. TFDS only describes the shards: its
own builders hold a split in memory and need TensorFlow past 1 GB. Tensors are stored as their bytes, because TFDS's
default encoding widens float16 and is six times slower; array_record compresses them.
"""

import json
import os
import re
import shutil
import tempfile
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from helios_jax.data.shard_cache import CachedRecords, CacheError
from helios_jax.locations import copy_file, is_remote, location, user_cache
from helios_jax.messages import one_line

Example = dict[str, Any]
# One record per group, so that every example can be read alone.
WRITER_OPTIONS = "group_size:1"
# Stored beside the records: the buckets of each split, [name, number of records], in the records' order.
BUCKETS = "buckets.json"
# The plan of a dataset that is being made: its settings, shards and items (`helios_jax.data.shards`).
PLAN = "plan.json"
# Embeddings of the empty text and of the negative prompt, for guidance, beside the records.
EMPTY_TEXT, NEGATIVE_TEXT = "empty_text.npy", "negative_text.npy"
LONGEST_NAME = 100  # characters of a dataset's name in those of its files, which have 255
OPENERS = 16  # array_record files whose indices are read at a time
DAMAGED = "copy the folder again, or delete it and make it again"


class RecordError(ValueError):
    """A record that cannot be read or used. The message is one line; it crosses from a worker process as it is."""


def tensor(shape: Sequence[int | None], dtype: Any) -> tfds.features.Tensor:
    """A feature for arrays of `shape` (None: any length) and numpy `dtype`, stored as raw bytes."""
    return tfds.features.Tensor(shape=tuple(shape), dtype=dtype, encoding="bytes")


def text() -> tfds.features.Text:
    """A feature for a str; `open_source` returns a str."""
    return tfds.features.Text()


def write(
    folder: str | os.PathLike,
    features: Mapping[str, Any],
    splits: Mapping[str, Iterable[Example]],
    *,
    shard_bytes: int = 2**28,
) -> Path:
    """Writes each split's examples, in their order, as array_record files into `folder`, and returns it.

    `features` maps each example key to `tensor(...)`, `text()` or another TFDS feature; a file is closed once it holds
    `shard_bytes` before compression. The folder appears under its name only when it is complete: a writer that is
    killed leaves at most a hidden `.NAME.*` folder beside it. Raises FileExistsError when `folder` holds anything,
    ValueError for a split without examples or an example that does not fit `features`.
    """
    folder = location(folder)
    check_free(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    remote = is_remote(folder)
    parent = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=None if remote else folder.parent))
    part = parent / "dataset"  # mkdtemp's own folder is private to its user
    part.mkdir()
    try:
        connector = tfds.features.FeaturesDict(dict(features))
        template = shard_template(part, folder.name)
        infos = [_write_split(split, template, connector, each, shard_bytes) for split, each in splits.items()]
        write_metadata(part, connector, infos)
        if remote:
            # The metadata come last: without them the folder is no dataset.
            for file in sorted(part.iterdir(), key=lambda file: file.suffix == ".json"):
                copy_file(file, folder / file.name)
        else:
            os.rename(part, folder)  # atomic: the same disk
    finally:
        shutil.rmtree(parent, ignore_errors=True)
    return folder


def check_free(folder: Path) -> None:
    """Raises FileExistsError unless a dataset can take the place of `folder`: it is absent, or an empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} already exists: a dataset is never overwritten; delete it or name another")
    if not is_remote(folder) and (folder.is_symlink() or folder.is_mount()):
        raise FileExistsError(f"{folder} is a link or a disk, whose place no dataset can take; name a folder in it")


def serialize(features: Any, example: Example) -> bytes:
    """An example as bytes that are the same in every process: protobuf would order the features arbitrarily.

    `features` is a TFDS FeaturesDict. Raises ValueError for an example that does not fit it.
    """
    serializer = ExampleSerializer(features.get_serialized_info())
    return serializer.get_tf_example(features.encode_example(example)).SerializeToString(deterministic=True)


def shard_template(folder: Path, name: str, split: str | None = None) -> tfds.core.ShardedFileTemplate:
    """The pattern of the names of a dataset's array_record files in `folder`."""
    # TFDS finds no file of a dataset whose name does not begin with a letter from a to z, and tells it at the very end.
    name = re.sub("[^a-z0-9_]", "_", name.lower())[:LONGEST_NAME].strip("_")
    name = name if name[:1].isalpha() else f"dataset_{name}".strip("_")
    return tfds.core.ShardedFileTemplate(
        epath.Path(str(folder)), dataset_name=name, split=split, filetype_suffix="array_record"
    )


def write_metadata(folder: Path, features: tfds.features.FeaturesDict, splits: Sequence[tfds.core.SplitInfo]) -> None:
    """Writes the metadata that makes a folder of array_record files a dataset."""
    tfds.folder_dataset.write_metadata(
        data_dir=epath.Path(str(folder)),
        features=features,
        split_infos=list(splits),
        filename_template=splits[0].filename_template,
        check_data=False,
    )


def _write_split(
    split: str,
    template: tfds.core.ShardedFileTemplate,
    connector: tfds.features.FeaturesDict,
    examples: Iterable[Example],
    shard_bytes: int,
) -> tfds.core.SplitInfo:
    template = template.replace(split=split)
    lengths: list[int] = []
    paths: list[Path] = []
    total = room = 0
    writer = None
    try:
        for example in examples:
            record = serialize(connector, example)
            if writer is None or room < len(record):
                if writer is not None:
                    writer.close()
                paths.append(Path(template.data_dir) / f"{split}-{len(paths)}")
                writer = ArrayRecordWriter(str(paths[-1]), WRITER_OPTIONS)
                lengths.append(0)
                room = shard_bytes
            writer.write(record)
            lengths[-1] += 1
            room -= len(record)
            total += len(record)
    finally:
        if writer is not None:
            writer.close()
    if not paths:
        raise ValueError(f"split {split!r} has no examples: give at least one or leave the split out")
    # The file names contain the number of shards, which is known only now.
    for i, path in enumerate(paths):
        path.rename(template.sharded_filepath(shard_index=i, num_shards=len(paths)))
    return tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=total, filename_template=template)


class Source:
    """A split of a dataset by index: examples are dicts of arrays, with text as str.

    `files` are its array_record files in order, each with its number of records. `buckets` maps the name of a size to
    the range of indices whose examples have that size and may share a batch. A record of `leave_out` is replaced by the
    next one of its bucket, so that all others keep their places. Raises ValueError for a number in `leave_out` that no
    record has, and where nothing is left of a bucket.
    """

    def __init__(
        self,
        records: Any,
        text_keys: Iterable[str],
        name: str,
        files: Sequence[tuple[Path, int]],
        buckets: Mapping[str, int] | None = None,
        leave_out: Sequence[int] = (),
    ):
        self._records = records
        self._text_keys = tuple(text_keys)
        self._name = name
        self._files = tuple(files)
        self._ends = list(accumulate(count for _, count in files))
        sizes = buckets or {"": len(records)}
        ends = pairwise(accumulate(sizes.values(), initial=0))
        self.buckets = {key: range(*pair) for key, pair in zip(sizes, ends)}
        self._instead = {number: self._after(number, set(leave_out)) for number in leave_out}

    def _after(self, number: int, left_out: set[int]) -> int:
        bucket = next((indices for indices in self.buckets.values() if number in indices), None)
        if bucket is None:
            raise ValueError(f"leave_out: {self._name} has no record {number}, it has 0 to {len(self) - 1}")
        others = (*range(number, bucket.stop), *range(bucket.start, number))
        found = next((other for other in others if other not in left_out), None)
        if found is None:
            raise ValueError(f"leave_out: nothing is left of records {bucket.start} to {bucket.stop - 1}")
        return found

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        index = int(index)
        number = self._instead.get(index, index)
        try:
            example = dict(self._records[number])
            for key in self._text_keys:
                example[key] = example[key].decode()
        except CacheError as error:
            raise RecordError(f"{self._name}: {error}") from None
        except Exception as error:  # array_record, protobuf and TFDS share no base class
            i = bisect_right(self._ends, number)
            place = number - (self._ends[i - 1] if i else 0)
            raise RecordError(
                f"{self._name}: record {number} (number {place} of {self._files[i][0].name}) is damaged: "
                f"{_reason(error)}; {DAMAGED}, or {leaving_out(number)}"
            ) from None
        return example

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    def of_each_bucket(self) -> list[Example]:
        """One example of each size."""
        return [self[indices.start] for indices in self.buckets.values()]

    def __repr__(self) -> str:
        # Grain shows this name in its errors.
        return self._name


def leaving_out(number: int) -> str:
    """The remedy for a record that cannot be used."""
    return f"leave it out with data.leave_out=[{number}]"


def _reason(error: Exception) -> str:
    """The error's text on one line. A truncated file's error has none."""
    return one_line(error) if str(error).strip() else "it ends early"


def open_source(
    folder: str | os.PathLike,
    split: str,
    *,
    make: str | None = None,
    leave_out: Sequence[int] = (),
    cache: str | os.PathLike | None = None,
) -> Source:
    """A random-access sequence of a split's examples, in the order they were written.

    `make` is the command that would write the folder, for the error. Opening reads the index of each file, but no
    record. Of files in a bucket it checks only the names; a file is copied to `cache` when its first record is asked
    for (`helios_jax.data.shard_cache`).

    Raises FileNotFoundError when the folder is missing or incomplete, and ValueError when it has no such split, when
    its metadata or a file is damaged, or for a `leave_out` that does not fit (`Source`).
    """
    folder = location(folder)
    if not (folder / "dataset_info.json").is_file() or not (folder / "features.json").is_file():
        begun = partial_folder(folder)
        if (begun / PLAN).is_file() if is_remote(folder) else begun.is_dir():
            raise FileNotFoundError(
                f"{folder} is not finished, {begun.name} holds what there is: repeat the command that "
                "was making it, it goes on where it stopped"
            )
        state = "is not a complete dataset" if folder.exists() else "does not exist"
        remedy = "name another folder" if make is None else f"make it with `{make}`"
        raise FileNotFoundError(
            f"{folder} {state}: it must hold dataset_info.json, features.json and array_record files; {remedy}"
        )
    try:
        builder: Any = tfds.builder_from_directory(str(folder))
        splits, features = dict(builder.info.splits), dict(builder.info.features)
        stored = json.loads((folder / BUCKETS).read_text()) if (folder / BUCKETS).is_file() else None
    except Exception as error:  # json, protobuf and TFDS share no base class
        raise ValueError(f"{folder}: its metadata is damaged: {_reason(error)}; {DAMAGED}") from None
    if split not in splits:
        raise ValueError(f"{folder} has no split {split!r}: choose one of {', '.join(sorted(splits))}")
    files = list(zip(map(location, splits[split].filepaths), splits[split].shard_lengths, strict=True))
    buckets = None if stored is None else dict(stored.get(split, ()))
    if buckets is not None and sum(buckets.values()) != sum(count for _, count in files):
        raise ValueError(f"{folder}: {BUCKETS} and dataset_info.json give other numbers of records; {DAMAGED}")
    records = builder.as_data_source(split)
    if is_remote(folder):
        present = {path.name for path in folder.iterdir()}
        if missing := [path for path, _ in files if path.name not in present]:
            raise ValueError(f"{missing[0]} is missing; {DAMAGED}")
        records.data_source = CachedRecords(files, user_cache() / "data" if cache is None else Path(cache))
    else:
        with ThreadPoolExecutor(OPENERS) as pool:
            if fault := next(filter(None, pool.map(_fault, files)), None):
                raise ValueError(f"{fault}; {DAMAGED}")
    text_keys = [key for key, feature in features.items() if isinstance(feature, tfds.features.Text)]
    return Source(records, text_keys, f"{folder}[{split}]", files, buckets, leave_out)


def _fault(file: tuple[Path, int]) -> str | None:
    """Describes a file that is missing, cut off or of another length; None for a whole one."""
    path, count = file
    if not path.is_file():
        return f"{path} is missing"
    try:
        reader = ArrayRecordReader(str(path))
        found = reader.num_records()
        reader.close()
    except (RuntimeError, ValueError) as error:
        return f"{path} is damaged: {_reason(error)}"
    return None if found == count else f"{path} is damaged: it holds {found} records of {count}"


def partial_folder(folder: Path) -> Path:
    """The folder that holds a dataset while it is being made (`helios_jax.data.shards`): one beside `folder`.

    In a bucket it is `folder` itself, where renaming would copy every byte: the metadata, written last, complete it.
    """
    if is_remote(folder):
        return folder
    return folder.with_name(f"{folder.name}.partial")
