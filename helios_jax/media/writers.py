"""Writers of sampled videos: an mp4, a folder of PNG frames, or the latents; and a JSON file beside it."""

import json
import os
import re
import zipfile
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from helios_jax.locations import Mirror, is_remote, location, replacing
from helios_jax.media.mp4 import VideoWriter
from helios_jax.path_checks import check_writable, kind_of

Format = Literal["mp4", "png", "npz"]
FRAME = re.compile(r"\d{6,}\.png")


@runtime_checkable
class Writer(Protocol):
    """Writer of one video, chunk by chunk. Chunks that were written survive if the process dies.

    With `keep`, an unfinished video is continued: its first `keep` frames stay, or all if it has fewer.
    """

    path: Path
    frames: int  # in the file so far
    takes: str  # "np": uint8 frames [t, h, w, 3]; "latent": latents [t, h, w, c]

    def write(self, chunk: Any, /) -> None: ...

    def close(self) -> None: ...


class FrameWriter:
    """Writes a folder of PNG files, 000000.png and on.

    Raises ValueError if the folder already holds PNG files, unless a video is continued (`keep`).
    """

    takes = "np"

    def __init__(self, path: str | os.PathLike, keep: int = 0):
        self.path = location(path)
        self.frames = 0
        kind = kind_of(self.path)
        if kind in ("file", "special"):
            raise ValueError(f"{path}: is a file or a device; name a folder for the frames")
        if kind == "folder" and not keep and any(self.path.glob("*.png")):
            raise ValueError(f"{path}: holds PNG files already; name a new folder, or empty this one")
        check_writable(self.path / "000000.png")
        while self.frames < keep and self._frame(self.frames).exists():
            self.frames += 1
        self._kept = self.frames

    def _frame(self, number: int) -> Path:
        return self.path / f"{number:06d}.png"

    def write(self, chunk: UInt8[np.ndarray, "t h w 3"]) -> None:
        if self.frames == self._kept:
            remove_frames(self.path, self._kept)
        for frame in chunk:
            with replacing(self._frame(self.frames)) as part:
                Image.fromarray(frame).save(part, "png")
            self.frames += 1

    def close(self) -> None:
        """Does nothing: every frame is already written."""


class LatentWriter:
    """Writes an .npz with `latents` [t, h, w, c] of whole chunks, normalized, and `chunk`, the latent frames per
    chunk.

    The file is rewritten after every chunk, so it is complete at any time.
    """

    takes = "latent"

    def __init__(self, path: str | os.PathLike, keep: int = 0):
        self.path = location(path)
        self._chunks: list[np.ndarray] = []
        check_writable(self.path)
        if keep and kind_of(self.path) == "file":
            self._keep(keep)
        self.frames = sum(len(chunk) for chunk in self._chunks)

    def _keep(self, most: int) -> None:
        try:
            with np.load(self.path) as file:
                latents, chunk = file["latents"][:most], int(file["chunk"])
            self._chunks = [latents[i : i + chunk] for i in range(0, len(latents), chunk)]
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{self.path}: does not read as latents ({error}), and cannot go on; name another file for the rest"
            ) from None

    def write(self, chunk: Float[np.ndarray, "t h w c"]) -> None:
        self._chunks.append(chunk)
        self.frames += len(chunk)
        with replacing(self.path) as part, part.open("wb") as file:
            np.savez(file, latents=np.concatenate(self._chunks), chunk=len(self._chunks[0]))

    def close(self) -> None:
        """Does nothing: the file is already complete."""


class ThreadedWriter:
    """Writes in a thread, in order, so that a slow `writer` does not delay the sampler.

    At most `PENDING` chunks are waiting or being written; `write` blocks until there is room. After an error nothing
    more is written, and the next `write` or `close` raises the error.
    """

    PENDING = 2

    def __init__(self, writer: Writer):
        self._writer = writer
        self._thread = ThreadPoolExecutor(1)
        self._pending: deque[Future[None]] = deque()
        self._failed = False
        self.path, self.takes = writer.path, writer.takes

    @property
    def frames(self) -> int:
        """Number of frames written."""
        return self._writer.frames

    def write(self, chunk: Any, then: Callable[[], None] | None = None) -> None:
        """Queues a chunk; the thread calls `then` once the chunk is in the file."""
        while self._pending and (self._pending[0].done() or len(self._pending) >= self.PENDING):
            self._wait()
        self._pending.append(self._thread.submit(self._write, chunk, then))

    def close(self) -> None:
        """Waits until everything is written and closes the writer. Later calls do nothing."""
        try:
            while self._pending:
                self._wait()
        finally:
            self._thread.shutdown()
            self._writer.close()

    def _wait(self) -> None:
        """Waits for the oldest chunk. If interrupted, the chunk stays for `close`."""
        wait([self._pending[0]])
        self._pending.popleft().result()

    def _write(self, chunk: Any, then: Callable[[], None] | None) -> None:
        if self._failed:
            return
        try:
            self._writer.write(chunk)
            if then is not None:
                then()
        except BaseException:
            self._failed = True
            raise


class BucketWriter:
    """Writes as `open_writer` does, to a temporary local file or folder, and copies it to the bucket after every chunk.

    Only frames that are new are copied; an mp4 or npz is copied whole, as a bucket's files cannot grow.
    """

    def __init__(self, path: str | os.PathLike, fps: float, height: int, width: int, keep: int):
        self.path = location(path)
        self._mirror = Mirror(self.path.parent)
        local = self._mirror.folder / self.path.name
        for frame in self.path.glob("*.png") if self.path.is_dir() else ():
            if keep:
                self._mirror.take(f"{self.path.name}/{frame.name}")
            else:
                local.mkdir(exist_ok=True)
                (local / frame.name).touch()
        if keep:
            self._mirror.take(self.path.name)
        try:
            self._writer = open_writer(local, fps, height, width, keep)
        except ValueError as error:
            raise ValueError(str(error).replace(str(local), str(self.path))) from None
        self.takes = self._writer.takes
        self.frames = self._kept = self._writer.frames

    def write(self, chunk: Any) -> None:
        if self.frames == self._kept:
            remove_frames(self.path, self._kept)
        self._writer.write(chunk)
        self.frames = self._writer.frames
        self._mirror.sync(now=True)

    def close(self) -> None:
        """Completes the file in the bucket, if anything was written."""
        self._writer.close()
        self._mirror.close()


def file_format(path: str | os.PathLike, chosen: Format | None) -> Format:
    """Output format by the suffix of `path`; `chosen` must agree if given. Raises ValueError."""
    suffix = location(path).suffix.lower()
    by_suffix: dict[str, Format] = {".mp4": "mp4", ".npz": "npz", "": "png"}
    if suffix not in by_suffix:
        raise ValueError(f"{path}: unknown suffix {suffix!r}; name .mp4, .npz (latents), or a folder (PNG frames)")
    if chosen is not None and by_suffix[suffix] != chosen:
        raise ValueError(
            f"{path}: ends like {by_suffix[suffix]}, but format is {chosen}: leave format out, or name it so"
        )
    return by_suffix[suffix]


def open_writer(path: str | os.PathLike, fps: float, height: int, width: int, keep: int = 0) -> Writer:
    """The writer for `path`. Raises ValueError before anything is written if the writer cannot work."""
    kind = file_format(path, None)
    if is_remote(path):
        return BucketWriter(path, fps, height, width, keep)
    if kind == "png":
        return FrameWriter(path, keep)
    return LatentWriter(path, keep) if kind == "npz" else VideoWriter(path, fps, height, width, keep)


def remove_frames(folder: Path, first: int = 0) -> None:
    """Removes the frames of a `FrameWriter` from number `first` on, and nothing else in the folder."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if FRAME.fullmatch(path.name) and int(path.stem) >= first:
            path.unlink()


def other_picture(folder: Path) -> str | None:
    """The name of a PNG in the folder that is no frame of a `FrameWriter`, which it would leave."""
    paths = folder.glob("*.png") if folder.is_dir() else ()
    return next((path.name for path in paths if not FRAME.fullmatch(path.name)), None)


def sidecar(path: str | os.PathLike) -> Path:
    """Path of a video's JSON: x.json beside x.mp4, x.npz or the folder x."""
    path = location(path)
    return path.with_suffix(".json") if path.suffix in (".mp4", ".npz") else path.with_name(f"{path.name}.json")


def write_sidecar(path: str | os.PathLike, facts: dict[str, Any]) -> None:
    """Writes `facts` about the video at `path`; the file is whole or absent."""
    with replacing(sidecar(path)) as part:
        part.write_text(json.dumps(facts, indent=2) + "\n")


def read_sidecar(path: str | os.PathLike) -> dict[str, Any] | None:
    """The facts of the video at `path`, or None if they are missing or no JSON object."""
    try:
        facts = json.loads(sidecar(path).read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return facts if isinstance(facts, dict) else None
