"""Errors that end a run after it has begun, and the check that its folders can be written."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from helios_jax.config import ConfigError
from helios_jax.locations import is_remote
from helios_jax.messages import one_line


class RunError(Exception):
    """A run that cannot go on; the message is one line. The checkpoints before it are whole."""


class NotFiniteError(RunError, ArithmeticError):
    """A loss or gradient that is NaN or infinite."""


def cannot_write(path: str | Path, error: Exception) -> RunError:
    """The error of a file that cannot be written, as on a full disk.

    TensorStore's messages are long; the system's error number in them gives a short reason.
    """
    number = re.search(r"os_error_code='(\d+)'", str(error))
    named = getattr(error, "filename", None) or path
    reason = os.strerror(int(number[1])) if number else getattr(error, "strerror", None) or one_line(error)
    return RunError(f"{named} cannot be written: {reason}; free space there, or name another folder with run=")


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
