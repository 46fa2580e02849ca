"""Checks of paths before anything is read there or written."""

import os
import stat
import tempfile
from pathlib import Path
from typing import Literal

from helios_jax.locations import is_remote

Kind = Literal["missing", "file", "folder", "special"]


def kind_of(path: Path) -> Kind:
    """Tells what is at `path`, links followed; "special" is a device, a FIFO or a socket.

    Raises ValueError for a name that the system refuses.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{_short(path)}: cannot be opened ({reason}); name another file") from None
    return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else "special"


def check_readable(path: Path, example: str) -> None:
    """Raises FileNotFoundError for a missing file and ValueError for anything that is not a file that can be read."""
    kind = kind_of(path)
    if kind == "missing":
        raise FileNotFoundError(f"{path}: no such file; name {example}")
    if kind == "folder":
        raise ValueError(f"{path}: is a folder; name {example}")
    if kind == "special":  # reading from a FIFO would wait for ever
        raise ValueError(f"{path}: is a device or a pipe, not a regular file; name {example}")
    if not is_remote(path) and not os.access(path, os.R_OK):
        raise ValueError(f"{path}: reading it is not permitted; name {example}")


def check_writable(path: Path) -> None:
    """Makes the folder of `path`, or raises ValueError if a regular file could not be written."""
    kind = kind_of(path)
    kind_of(_part(path))  # the name of the temporary file is longer, and may be too long
    if kind == "folder":
        raise ValueError(f"{path}: is a folder; name a file in it, such as {path / 'video.mp4'}")
    if kind == "special":
        raise ValueError(f"{path}: is a device or a pipe; only regular files are written, name another file")
    check_folder(path.parent, path)
    if kind == "file" and not is_remote(path) and not os.access(path, os.W_OK):
        raise ValueError(f"{path}: writing there is not permitted; name another folder")


def check_folder(folder: Path, path: Path | None = None) -> None:
    """Makes the folder (of `path`), or raises ValueError if no file could be written in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        which = "its folder cannot be made" if path is not None else "cannot be made"
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, FileExistsError | NotADirectoryError):
            reason = f"{next((place for place in (folder, *folder.parents) if place.exists()), folder)} is a file"
        raise ValueError(f"{_short(path or folder)}: {which} ({reason}); name another folder") from None
    try:  # permissions alone do not tell: the superuser has all of them, in /proc, too
        if is_remote(folder):
            probe = folder / f".probe.{os.uname().nodename}.{os.getpid()}"
            probe.touch()
            probe.unlink()
        else:
            with tempfile.TemporaryFile(dir=folder):
                pass
    except OSError as error:
        raise ValueError(
            f"{path or folder}: writing there is not permitted ({error.strerror}); name another folder"
        ) from None


def _part(path: Path) -> Path:
    """The temporary file that `locations.replacing` writes in place of `path`."""
    return path.with_name(f".{path.name}") if path.name else path


def _short(path: Path) -> str:
    """The path as text; the middle of a very long one is left out."""
    text = str(path).replace("\0", "?")
    return text if len(text) <= 200 else f"{text[:90]}...{text[-90:]}"
