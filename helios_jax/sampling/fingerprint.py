"""Hashes of what a video depends on: of weights a sample, cheap even for 28 GB; of inputs every byte."""

import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from helios_jax.locations import location
from helios_jax.sampling.download import is_url

SAMPLE = 2**20
PATTERNS = ("*.safetensors", "*.json", "*.model")  # weights, configs and tokenizers


def weights_hash(folders: Iterable[Path]) -> str:
    """SHA-256 over the files of a model in `folders`; see `_digest`."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(path for pattern in PATTERNS for path in folder.glob(pattern)):
            _digest(digest, path, f"{folder.name}/{path.name}")
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 over one file of weights; see `_digest`. Its name does not count."""
    _digest(digest := hashlib.sha256(), path, "")
    return digest.hexdigest()


def _digest(digest: "hashlib._Hash", path: Path, name: str) -> None:
    """Adds a file's name, its size, and a MiB of its start, middle and end.

    The start holds every tensor's name, shape and place. It tells checkpoints apart; it does not prove that every byte
    is as it was.
    """
    size = path.stat().st_size
    digest.update(f"{name} {size}\n".encode())
    with path.open("rb") as file:
        for place in (0, max(0, size // 2 - SAMPLE // 2), max(0, size - SAMPLE)):
            file.seek(place)
            digest.update(file.read(SAMPLE))


@cache
def content_hash(name: str) -> str | None:
    """SHA-256 over all of an input: a file, or the files of a folder in the order of their names; None if it is gone.

    Of a URL it is the text: what it names is not loaded for this.
    """
    if is_url(name):
        return hashlib.sha256(name.encode()).hexdigest()
    path = location(name)
    try:
        if path.is_dir():
            lines = [f"{part.name} {content_hash(str(part))}" for part in sorted(path.iterdir()) if part.is_file()]
            return hashlib.sha256("\n".join(lines).encode()).hexdigest()
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
