"""Files that a run writes: what another run or a person made is never overwritten unasked."""

import re
from pathlib import Path

from helios_jax import lora
from helios_jax.config import ConfigError
from helios_jax.media.files import check_writable
from helios_jax.media.writers import read_sidecar, sidecar
from helios_jax.sampling.jobs import Job

FRAME = re.compile(r"\d{6}\.png")


def check(job: Job) -> None:
    """Raises ConfigError where a file of the video would take the place of one that the same run did not make."""
    config = job.config
    written = {"out": job.out, "the JSON beside it": sidecar(job.out)}
    if config.state is not None:
        written["state"] = Path(config.state)
    if config.profile is not None:
        written["profile"] = Path(config.profile)
    read = {"image": config.image, "video": config.video, "resume": config.resume}
    read |= {f"lora {i + 1}": lora.file_and_scale(text)[0] for i, text in enumerate(config.loras)}
    places: dict[Path, str] = {}
    for name, path in written.items():
        if (other := places.setdefault(path.resolve(), name)) != name:
            raise ConfigError(f"{name}: {path} is also {other}: name another file")
    for name, path in read.items():
        target = None if path is None else places.get(Path(path).resolve())
        if target is not None and (target, name) != ("state", "resume"):
            raise ConfigError(f"{target}: {path} is the run's {name}, and would be overwritten: name another file")
    for path in (sidecar(job.out), None if config.state is None else Path(config.state)):
        if path is not None:
            check_writable(path)
    if config.overwrite:
        return
    if _made(job.out) and not is_rest_of(job):
        remedy = "name another file, or --overwrite"
        if config.resume is not None:
            remedy = "the rest of the video needs a file of its own: " + remedy
        raise ConfigError(f"out: {job.out} is there already: {remedy}")
    facts = sidecar(job.out)
    if facts.exists() and "settings" not in (read_sidecar(job.out) or {}):
        raise ConfigError(
            f"out: {facts}, where the facts of the video go, is another file: name another out, or --overwrite"
        )
    if config.state is not None and Path(config.state).exists() and not _same(config.state, config.resume):
        raise ConfigError(
            f"state: {config.state} is there already: go on from it by --resume, name another file, or --overwrite"
        )


def is_rest_of(job: Job) -> bool:
    """True if the file is what an interrupted run of the same video left, which this run makes again."""
    facts = read_sidecar(job.out) or {}
    return job.config.resume is None and facts.get("complete") is False and facts.get("settings") == job.settings()


def clear(path: Path) -> None:
    """Removes the frames of a folder, and nothing else in it; files are replaced as they are written."""
    if path.is_dir():
        for frame in path.iterdir():
            if FRAME.fullmatch(frame.name):
                frame.unlink()


def _made(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.exists()


def _same(one: str, other: str | None) -> bool:
    return other is not None and Path(one).resolve() == Path(other).resolve()
