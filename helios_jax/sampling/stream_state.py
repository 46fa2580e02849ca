"""The state of a stream between two chunks, as a file: saved while a video grows, and read to go on from."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from helios_jax.diffusion.memory import History
from helios_jax.locations import local_copy, location, replacing
from helios_jax.path_checks import kind_of
from helios_jax.sampling.noise import SeededNoise
from helios_jax.sampling.options import SamplingOptions
from helios_jax.sampling.prompts import Entry, Schedule

FORMAT = "helios_jax stream 2"
_HISTORY = [field.name for field in dataclasses.fields(History)]


@dataclass(frozen=True)
class Snapshot:
    """A stream's state after a chunk: `meta` is JSON."""

    meta: str
    history: History

    @classmethod
    def of(cls, meta: Mapping[str, Any], history: History) -> "Snapshot":
        """A snapshot of `meta`, which has all that `read_state` reads beside the history."""
        return cls(json.dumps({"format": FORMAT, **meta}), history)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the file, which is whole or absent. Raises OSError, which names it, if that fails."""
        history = {name: np.asarray(getattr(self.history, name)) for name in _HISTORY}
        path = location(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            try:
                save_file(history, part, metadata={"state": self.meta, "sha256": _digest(self.meta, history)})
            except SafetensorError as error:
                raise OSError(str(error)) from None


@dataclass(frozen=True)
class State:
    """The state that `Stream.save_state` wrote."""

    identity: dict[str, Any]
    options: SamplingOptions
    prompts: Schedule
    negatives: tuple[str, ...]
    noise: SeededNoise
    history: History
    chunk: int
    about: dict[str, Any] | None = None


def read_state(path: str | os.PathLike) -> State:
    """Reads a file of `Stream.save_state`. Raises ValueError, in one line, if it is missing, broken or another kind."""
    path = location(path)
    if kind_of(path) in ("folder", "special"):  # reading from a pipe would wait for ever
        raise ValueError(f"{path}: not the state of a stream; name a file that save_state wrote")
    try:
        with local_copy(path) as copy, safe_open(copy, "numpy") as file:
            told = file.metadata() or {}
            if f'"{FORMAT}"' not in told.get("state", ""):
                raise ValueError(f"{path}: not the state of a stream; name a file that save_state wrote")
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; name a file that save_state wrote") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not the state of a stream ({error}); name a file that save_state wrote") from None
    if told.get("sha256") != _digest(told["state"], arrays):
        raise ValueError(f"{path}: is damaged, its checksum is another; name a state that is whole")
    meta = json.loads(told["state"])
    entries = tuple(Entry(e["chunk"], tuple(e["prompts"]), e["crossfade"]) for e in meta["prompts"])
    return State(
        identity=meta["identity"],
        options=SamplingOptions().changed(meta["options"]),
        prompts=Schedule(entries),
        negatives=tuple(meta["negatives"]),
        noise=SeededNoise(*meta["seeds"], asked=meta["asked"]),
        history=History(**{name: jnp.asarray(array) for name, array in arrays.items()}),
        chunk=meta["chunk"],
        about=meta.get("about"),
    )


def _digest(meta: str, history: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over a state, by which a damaged file is detected."""
    digest = hashlib.sha256(meta.encode())
    for name in sorted(history):
        digest.update(f"{name} {history[name].dtype} {history[name].shape}".encode())
        digest.update(np.ascontiguousarray(history[name]).tobytes())
    return digest.hexdigest()
