"""Checks of the files that a run writes: files of other runs or of a person are never overwritten unasked."""

import fcntl
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from helios_jax import lora
from helios_jax.config import ConfigError
from helios_jax.locations import is_remote, location
from helios_jax.media.writers import other_picture, read_sidecar, sidecar
from helios_jax.path_checks import check_folder, check_writable
from helios_jax.runtime import interrupts
from helios_jax.sampling.download import is_url
from helios_jax.sampling.jobs import Job


def check(job: Job, *, goes_on: bool = False) -> None:
    """Raises ConfigError if a file of the video would overwrite a file that this run did not make.

    With `goes_on`, the video's own file exists and will be continued.
    """
    config = job.config
    written = {"out": job.out, "the JSON beside it": sidecar(job.out)}
    if config.state is not None:
        written["state"] = location(config.state)
    if config.profile is not None:
        written["profile"] = location(config.profile)
    read = {"image": config.image, "video": config.video, "resume": config.resume}
    read |= {f"lora {i + 1}": lora.file_and_scale(text)[0] for i, text in enumerate(config.loras)}
    places: dict[Path, str] = {}
    for name, path in written.items():
        if (other := places.setdefault(path.resolve(), name)) != name:
            raise ConfigError(f"{name}: {path} is also {other}: name another file")
    for name, path in read.items():
        target = None if path is None or is_url(path) else places.get(location(path).resolve())
        if target is not None and (target, name) != ("state", "resume"):
            raise ConfigError(f"{target}: {path} is the run's {name}, and would be overwritten: name another file")
    checked = [None if is_remote(job.out) else _lock(job.out), sidecar(job.out), written.get("state")]
    for path in filter(None, checked):
        check_writable(path)
    if config.profile is not None:
        check_folder(location(config.profile))
    if job.out.suffix:
        check_writable(job.out)
    if goes_on:
        return
    if config.overwrite:
        if not job.out.suffix and (other := other_picture(job.out)):
            raise ConfigError(
                f"out: {job.out} holds {other}, which is no frame of a video: name a new folder, or empty this one"
            )
        return
    if _has_content(job.out) and not is_rest_of(job):
        remedy = "name another file, or --overwrite"
        if config.resume is not None:
            remedy = "it is not the file of the video of this state: " + remedy
        raise ConfigError(f"out: {job.out} is there already: {remedy}")
    facts = sidecar(job.out)
    if facts.exists() and "settings" not in (read_sidecar(job.out) or {}):
        raise ConfigError(
            f"out: {facts}, where the facts of the video go, is another file: name another out, or --overwrite"
        )
    if config.state is not None and location(config.state).exists() and not _same(config.state, config.resume):
        raise ConfigError(
            f"state: {config.state} is there already: go on from it by --resume, name another file, or --overwrite"
        )


def is_rest_of(job: Job) -> bool:
    """True if an interrupted run left the file of the same video unfinished; this run makes it again."""
    facts = read_sidecar(job.out) or {}
    return job.config.resume is None and facts.get("complete") is False and not job.differs(facts)


@contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Locks the video at `path` for this process; yields False if another process, perhaps one just ending, holds it.

    The lock is on a file beside the video, and the system releases it however the process ends. A bucket has no locks.
    """
    if is_remote(path):
        yield True
        return
    lock = _lock(path)
    lock.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with lock.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            except OSError as error:  # a file system without locks
                warnings.warn(f"{lock}: no lock ({error.strerror}): don't let two runs make one video", stacklevel=2)
            if not _is_open_as(file.fileno(), lock):  # the process that held it has just removed it
                continue
            try:
                with interrupts.temporary(lock):
                    yield True
            finally:
                lock.unlink(missing_ok=True)
            return


def _lock(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _is_open_as(descriptor: int, path: Path) -> bool:
    """True if the open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _has_content(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.exists()


def _same(one: str, other: str | None) -> bool:
    return other is not None and location(one).resolve() == location(other).resolve()
