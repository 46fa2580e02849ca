"""Errors that end a run after it has begun, reads that are tried again, and the check that folders can be written."""

import contextlib
import errno
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import jax

from helios_jax.config import ConfigError
from helios_jax.locations import is_remote
from helios_jax.messages import one_line

T = TypeVar("T")

PAUSES = (2.0, 8.0)  # seconds before a file is read again
ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
# Statuses of TensorStore that come from a bucket's service.
SERVICE = re.compile(
    r"\b(?:UNAVAILABLE|DEADLINE_EXCEEDED|PERMISSION_DENIED|UNAUTHENTICATED|RESOURCE_EXHAUSTED|ABORTED|CANCELLED): .*"
)


class RunError(Exception):
    """A run that cannot go on; the message is one line. The checkpoints before it are whole."""


class NotFiniteError(RunError, ArithmeticError):
    """A loss or gradient that is NaN or infinite."""


def cannot_write(path: str | Path, error: Exception) -> RunError:
    """The error of a file that cannot be written, as on a full disk.

    TensorStore's messages are long; the system's error number in them gives a short reason.
    """
    number = _system_error(error)
    named = getattr(error, "filename", None) or path
    reason = os.strerror(number) if number else getattr(error, "strerror", None) or one_line(error)
    return RunError(f"{named} cannot be written: {reason}; free space there, or name another folder with run=")


def _system_error(error: BaseException) -> int | None:
    """The system's error number in a message of TensorStore."""
    number = re.search(r"os_error_code='(\d+)'", str(error))
    return int(number[1]) if number else None


def unreadable(error: BaseException) -> str | None:
    """The reason of an error by which files could not be read now; None where it tells of the files themselves.

    A network's file system may fail for a moment (ESTALE, EIO), and a bucket's service too: that is no damage. Files
    that are absent or cut off, or that hold something else, are.
    """
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and found.errno not in ABSENT and not isinstance(found, FileNotFoundError):
            return found.strerror or one_line(found)
        number = _system_error(found)
        if number is not None and number not in ABSENT:
            return os.strerror(number)
        if told := SERVICE.search(one_line(found)):
            return told[0]
        found = found.__cause__
    return None


def cannot_read(path: str | Path, reason: str) -> RunError:
    """The error of files that cannot be read now."""
    return RunError(f"{path} cannot be read: {reason}; nothing was changed, the same command tries again")


def read_again(read: Callable[[], T]) -> T:
    """`read()`, tried again after PAUSES if files cannot be read now; the last error is raised."""
    for pause in PAUSES:
        try:
            return read()
        except jax.errors.JaxRuntimeError:  # of devices, with the statuses of a service
            raise
        except Exception as error:
            if unreadable(error) is None:
                raise
        time.sleep(pause)
    return read()


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turns an OSError inside the block, which reads from `path`, into a RunError."""
    try:
        yield
    except OSError as error:
        raise cannot_read(error.filename or path, error.strerror or one_line(error)) from None


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turns an OSError inside the block, which writes to `path`, into a RunError."""
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from None


def check_folder(folder: Path, key: str) -> None:
    """Raises ConfigError unless files can be made in `folder`; leaves no file and no new folder behind."""
    # Folders of a bucket are only prefixes of names: there is nothing to make.
    absent = [] if is_remote(folder) else [path for path in (folder, *folder.parents) if not path.exists()]
    made: list[Path] = []
    try:
        for path in reversed(absent):
            path.mkdir()
            made.append(path)
        probe = folder / f".probe.{os.uname().nodename}.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        blocking = None
        if not is_remote(folder):
            blocking = next((path for path in (folder, *folder.parents) if path.is_file()), None)
        reason = f"{blocking} is a file" if blocking is not None else error.strerror or error
        raise ConfigError(
            f"{key}: {folder} cannot be written: {reason}; name another folder, as in {key}=..."
        ) from None
    finally:
        for path in reversed(made):
            path.rmdir()
