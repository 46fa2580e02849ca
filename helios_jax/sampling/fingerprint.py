"""Hashes of the files that a video depends on: of samples of the weights, cheap even for 28 GB; of all input bytes."""

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
    """SHA-256 over one file of weights, without its name; see `_digest`."""
    _digest(digest := hashlib.sha256(), path, "")
    return digest.hexdigest()


def _digest(digest: "hashlib._Hash", path: Path, name: str) -> None:
    """Adds `name`, the file's size, and a MiB each of its start, middle and end to `digest`.

    The start of a safetensors file holds every tensor's name, shape and offset. The hash tells checkpoints apart; it
    does not prove that every byte is unchanged.
    """
    size = path.stat().st_size
    digest.update(f"{name} {size}\n".encode())
    with path.open("rb") as file:
        for place in (0, max(0, size // 2 - SAMPLE // 2), max(0, size - SAMPLE)):
            file.seek(place)
            digest.update(file.read(SAMPLE))


@cache
def content_hash(name: str) -> str | None:
    """SHA-256 over all bytes of an input: a file, or the files of a folder in the order of their names.

    None if it cannot be read. Of a URL only the text is hashed: nothing is downloaded for this.
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
