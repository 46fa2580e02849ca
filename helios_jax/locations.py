"""Locations of files: local paths, and folders of buckets such as gs://BUCKET/NAME.

`location` turns a text into a path: pathlib's for a local file, a `BucketPath` with the same methods for a bucket's.
Code that needs local files works on a copy: `local_copy` to read, `replacing` to write, `Mirror` for files that grow.
"""

import argparse
import errno
import io
import os
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import fsspec
from etils import epath
from etils.epath.backend import fsspec_backend
from etils.epath.gpath import PosixGPath
from fsspec.config import conf

from helios_jax.messages import one_line

# The schemes that etils knows, and the packages that fsspec reads them with.
PACKAGES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs", "hf": "huggingface_hub"}
# With one slash, only the schemes of buckets are taken for an address that was mistyped: names may have colons.
ADDRESS = re.compile(rf"(?:([a-z][a-z0-9+.-]*):/|({'|'.join(PACKAGES)}):)/", re.IGNORECASE)
BLOCK = 16 * 2**20  # bytes that are copied at a time
MIRRORED_EVERY = 60.0  # seconds between two uploads of files that grow
VISIBLE = 10.0  # seconds that a network's file system may take to show a new file


class LocationError(ValueError):
    """A location that cannot be used; the message is one line."""


@contextmanager
def _errors(path: Any) -> Iterator[None]:
    """Turns errors of a bucket's service, which share no class, into OSErrors of one line."""
    try:
        yield
    except (OSError, ValueError, NotImplementedError):
        raise
    except Exception as error:
        raise OSError(errno.EIO, one_line(error), os.fspath(path)) from error


class _Backend:
    """etils' access to buckets."""

    def __getattr__(self, name: str) -> Any:
        def call(path: Any, *rest: Any, **options: Any) -> Any:
            with _errors(path):
                return getattr(fsspec_backend, name)(path, *rest, **options)

        return call


class _File:
    """An open file of a bucket. Data is uploaded when it is closed, so that closing can fail, too."""

    def __init__(self, file: Any, path: str):
        self._file, self._path = file, path

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._file, name)
        if not callable(found):
            return found

        def call(*arguments: Any, **options: Any) -> Any:
            with _errors(self._path):
                return found(*arguments, **options)

        return call

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *error: Any) -> None:
        with _errors(self._path):
            self._file.__exit__(*error)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._file)


BACKEND = _Backend()
NOWHERE = ("/", "dev", "null")  # a file, so that nothing lies in it


def _nowhere(parts: tuple[str | os.PathLike, ...]) -> tuple[str | os.PathLike, ...]:
    """The parts of an address, as a BucketPath holds them; those of a BucketPath already stay."""
    text = "/".join(os.fspath(part) for part in parts)
    scheme, mark, rest = text.partition("://")
    return (*NOWHERE, scheme, rest) if mark and scheme in PACKAGES else parts


class BucketPath(PosixGPath, Path):  # pyright: ignore[reportIncompatibleMethodOverride]
    """A file or folder of a bucket, with the methods of pathlib.Path that etils leaves out or defines otherwise.

    Its parts begin with NOWHERE. So `pathlib.Path(path)`, which keeps the parts but not the class, is a place that can
    be neither made nor written; with the parts that etils uses it would be a local /gs/BUCKET/NAME.
    """

    if sys.version_info < (3, 12):

        def __new__(cls, *parts: str | os.PathLike) -> Self:
            return super().__new__(cls, *_nowhere(parts))

    else:

        def __init__(self, *parts: str | os.PathLike) -> None:
            super().__init__(*_nowhere(parts))

    @property
    def _uri_scheme(self) -> str | None:
        begin, rest = self.parts[: len(NOWHERE)], self.parts[len(NOWHERE) :]
        return rest[0] if begin == NOWHERE and rest else None

    @property
    def _path_str(self) -> str:
        if self._uri_scheme is None:
            return super()._path_str
        scheme, *rest = self.parts[len(NOWHERE) :]
        return f"{scheme}://{'/'.join(rest)}"

    @property
    def _backend(self) -> Any:
        return BACKEND

    def open(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> Any:
        """As pathlib's, for modes r, w, rb and wb. Unbuffered reads download only the bytes that are read."""
        options = {"cache_type": "none"} if buffering == 0 and mode == "rb" else {}
        kind = f"{mode.replace('b', '').replace('t', '')}b"
        if kind not in ("rb", "wb"):
            raise io.UnsupportedOperation(f"{self}: a file of a bucket is read or written whole, not opened as {mode}")
        with _errors(self):
            file: Any = _File(fsspec_backend.fs(str(self)).open(str(self), kind, **options), str(self))
        return file if "b" in mode else io.TextIOWrapper(file, encoding or "utf-8", errors, newline)

    def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def write_text(
        self, data: str, encoding: str | None = None, errors: str | None = None, newline: str | None = None
    ) -> int:
        assert newline is None, "text is written as it is"
        return self.write_bytes(data.encode(encoding or "utf-8", errors or "strict"))

    def touch(self, mode: int = 0o666, exist_ok: bool = True) -> None:
        if not self.exists():
            self.write_bytes(b"")
        elif not exist_ok:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self))

    def stat(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        found = super().stat()
        mode = stat.S_IFDIR | 0o777 if found.is_directory else stat.S_IFREG | 0o666
        return os.stat_result((mode, 0, 0, 1, 0, 0, found.length or 0, *[found.mtime or 0] * 3))

    def resolve(self, strict: bool = False) -> Self:
        return self

    def absolute(self) -> Self:
        return self


def location(name: str | os.PathLike) -> Path:
    """The path that a text names: a `BucketPath` for a bucket's, which is used like pathlib's.

    Raises LocationError for a scheme that is not known, and for one whose package is not installed.
    """
    if isinstance(name, Path):
        return name
    text = os.fspath(name)
    found = ADDRESS.match(text)
    if found is None:
        return Path(text)
    scheme = found[1] or found[2]
    if scheme not in PACKAGES or not re.match(r"[a-z0-9]+://[^/]+/[^/]", text):
        raise LocationError(
            f"{text} names no place that can be used; a bucket's is gs://BUCKET/NAME or s3://BUCKET/NAME, and a local "
            f"name with a colon is ./{text}"
        )
    # Hosts of one run must see each other's new files.
    conf.setdefault(scheme, {}).setdefault("use_listings_cache", False)
    if scheme == "gs":
        conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError:
        raise LocationError(f"{text} needs another package: pip install {PACKAGES[scheme]}") from None
    return BucketPath(text)


def path_argument(text: str) -> Path:
    """`location`, as the type of a command line's argument."""
    try:
        return location(text)
    except LocationError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def user_cache() -> Path:
    """The folder helios_jax in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "helios_jax"


def is_remote(path: str | os.PathLike) -> bool:
    """True for a place in a bucket."""
    return ADDRESS.match(os.fspath(path)) is not None


def check_locations(local: bool = False, **names: str | None) -> None:
    """Raises LocationError, which begins with the name of the setting, for a text that cannot be a location.

    With `local`, it must be one of this machine.
    """
    for key, text in names.items():
        if text is None:
            continue
        if local and is_remote(text):
            raise LocationError(f"{key}: {text} is remote, and this must be local: name a local folder or file")
        try:
            location(text)
        except LocationError as error:
            raise LocationError(f"{key}: {error}") from None


def wait_for_text(path: Path, text: str) -> bool:
    """Waits until a file has a text that another machine has just written; False if not within `VISIBLE` seconds."""
    until = time.monotonic() + VISIBLE
    while True:
        with suppress(OSError):
            if path.read_text() == text:
                return True
        if time.monotonic() > until:
            return False
        time.sleep(0.1)


def copy_file(source: Path, target: Path) -> None:
    """Copies a file, from and to any place. In a bucket, readers see either the whole new file or the old one."""
    with source.open("rb") as file, target.open("wb") as out:
        shutil.copyfileobj(file, out, BLOCK)


def copy_tree(source: Path, target: Path) -> None:
    """Copies the files of a folder and its subfolders, from and to any place; files of the same name are replaced."""
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_dir():
            copy_tree(path, target / path.name)
        else:
            copy_file(path, target / path.name)


@contextmanager
def local_copy(path: Path) -> Iterator[Path]:
    """Yields a local file or folder with the content of `path`: itself if it is local, else a temporary copy.

    ValueError and FileNotFoundError about the copy name `path` instead.
    """
    if not is_remote(path):
        yield path
        return
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    with tempfile.TemporaryDirectory(prefix="helios-") as folder:
        copy = Path(folder) / path.name
        if path.is_dir():
            copy_tree(path, copy)
        else:
            copy_file(path, copy)
        try:
            yield copy
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(str(error).replace(str(copy), str(path))) from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a local path to write to, which replaces `path` at the end. On an error `path` stays as it was.

    No temporary file is left. Raises OSError with `path` in its text if writing fails.
    """
    remote = is_remote(path)
    folder = Path(tempfile.mkdtemp(prefix="helios-")) if remote else path.parent
    part = folder / (path.name if remote or not path.name else f".{path.name}")
    try:
        yield part
        if remote:
            copy_file(part, path)
        else:
            part.replace(path)
    except OSError as error:
        raise write_error(error, path) from None
    finally:
        if remote:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def write_error(error: OSError, path: Path) -> OSError:
    """The error of a failed write, with the path in its text."""
    reason = f"{error.strerror or error}; what was whole before is kept"
    return OSError(error.errno or 0, reason, str(path))


class Mirror:
    """A folder for files that grow line by line, which a bucket's cannot.

    `folder` is the local folder to write in. If `path` is a bucket's, it is a temporary one, and `sync` copies files
    that have changed to `path`.
    """

    def __init__(self, path: Path):
        self.path = path
        self._temporary = tempfile.TemporaryDirectory(prefix="helios-") if is_remote(path) else None
        self.folder = path if self._temporary is None else Path(self._temporary.name)
        self._sizes: dict[Path, int] = {}
        self._last = -MIRRORED_EVERY

    def take(self, name: str) -> Path:
        """The local file of this name, with the content that `path` already has, if any."""
        copy = self.folder / name
        if self._temporary is not None and (self.path / name).is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy_file(self.path / name, copy)
            self._sizes[copy] = copy.stat().st_size
        return copy

    def sync(self, *, now: bool = False) -> None:
        """Copies the files that have changed; at most once in `MIRRORED_EVERY` seconds, unless `now`."""
        if self._temporary is None or (not now and time.monotonic() < self._last + MIRRORED_EVERY):
            return
        self._last = time.monotonic()
        for file in self.folder.rglob("*"):
            if file.is_file() and self._sizes.get(file) != (size := file.stat().st_size):
                copy_file(file, self.path / file.relative_to(self.folder).as_posix())
                self._sizes[file] = size

    def close(self) -> None:
        """Copies the files that have changed, and removes the temporary folder."""
        if self._temporary is not None:
            self.sync(now=True)
            self._temporary.cleanup()


def standard(path: Path) -> epath.Path:
    """The path as etils' own class, for libraries that accept no other."""
    return epath.Path(str(path))
