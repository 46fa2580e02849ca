"""Records of a dataset in a bucket: each file is copied to a local folder once, when its first record is asked for.

array_record reads local files only. Several processes of a machine share the copies: the first that needs a file copies
it, the others wait for it.
"""

import fcntl
import threading
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import fsspec
from array_record.python.array_record_module import ArrayRecordReader

from helios_jax.locations import copy_file, location
from helios_jax.messages import one_line

READER_OPTIONS = "readahead_buffer_size:0"  # single records are read, in any order


class CacheError(OSError):
    """A file that cannot be copied to this machine; the message is one line."""


class CachedRecords:
    """Records of array_record files in a bucket, by number, as bytes; `files` are pairs (path, number of records).

    It can be pickled for other processes, which open the copies themselves.
    """

    def __init__(self, files: Sequence[tuple[Path, int]], cache: Path):
        self._files, self._cache = tuple((str(path), count) for path, count in files), cache
        self._ends = list(accumulate(count for _, count in files))
        self._readers: dict[int, Any] = {}
        self._locks = [threading.Lock() for _ in files]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, number: int) -> bytes:
        i = bisect_right(self._ends, number)
        with self._locks[i]:
            if i not in self._readers:
                self._readers[i] = self._open(i)
        return self._readers[i].read([number - (self._ends[i - 1] if i else 0)])[0]

    def __getstate__(self) -> Any:
        return [(path, count) for path, count in self._files], self._cache

    def __setstate__(self, state: Any) -> None:
        self.__init__(*state)

    def _open(self, i: int) -> Any:
        name, count = self._files[i]
        reader = ArrayRecordReader(str(fetch(name, self._cache)), READER_OPTIONS, file_reader_buffer_size=32768)
        if (found := reader.num_records()) != count:
            raise ValueError(f"{name} holds {found} records of {count}")
        return reader


def fetch(name: str, cache: Path) -> Path:
    """The copy of a bucket's file in the folder `cache`, made if it is not there yet.

    The version of the file is part of the copy's name, so a dataset that was made anew is copied anew. Raises
    CacheError.
    """
    system, path = fsspec.core.url_to_fs(name)
    scheme, _, rest = name.partition("://")
    try:
        size, version = system.info(path)["size"], system.ukey(path)[:16]
        target = cache / scheme / f"{rest}.{version}"
        if target.is_file() and target.stat().st_size == size:
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with (target.parent / f".{target.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.is_file() or target.stat().st_size != size:
                _copy(name, target, size)
    except CacheError:
        raise
    except Exception as error:  # storage services share no base class; also a full disk
        reason = getattr(error, "strerror", None) or one_line(error)
        raise CacheError(f"{name} cannot be copied to {cache}: {reason}") from None
    return target


def _copy(name: str, target: Path, size: int) -> None:
    part = target.with_name(f".{target.name}.part")
    try:
        copy_file(location(name), part)
        if (found := part.stat().st_size) != size:
            raise CacheError(f"{name} is {size} bytes, of which {found} came: give the same command again")
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
