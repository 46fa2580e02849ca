"""Strict reading of video files: damaged files are refused, while a decoder by default invents missing content.

PyAV is imported when the first file is opened.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8

from helios_jax.media.pictures import is_webp, read_folder, read_webp
from helios_jax.path_checks import check_readable, kind_of

if TYPE_CHECKING:
    import av
    from av.container import InputContainer

BUFFER = 1 << 18  # bytes read at once
FAR = 250  # frames: key frames are seldom further apart
EXACT = 0x2 | 0x40000 | 0x2000  # BILINEAR, ACCURATE_RND and FULL_CHR_H_INT; the default darkens colours by up to 2
ROUNDING = 1e-3  # seconds: many containers keep times in milliseconds


def read_video(path: str | os.PathLike, fps: float | None = None) -> tuple[UInt8[np.ndarray, "t h w 3"], float]:
    """All RGB frames of a file's first video stream, upright, and its frames per second.

    With `fps` the file is read at that rate: the frame nearest to each instant 0, 1 / fps, ...

    The tags of the file tell its colours (matrix and range); one without tags is taken as BT.601 in limited range. A
    folder of PNG frames, 000000.png and on, is a video without a rate (0).

    Raises FileNotFoundError for a missing file and ValueError, in one line, for a rate that is not positive, for a
    file without a video stream and for one that is damaged: data that does not decode, or data that its index names
    and that is missing. Frames that an edit list hides are not read. (Changed bits that still decode cannot be
    detected: H.264 has no checksum.)
    """
    frames = list(_at_rate(path, fps))
    return np.stack([frame for frame, _ in frames]), frames[-1][1]


def iterate_video(path: str | os.PathLike, fps: float | None = None) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """The frames of `read_video` one by one, for files too long for memory. Raises the errors of `read_video`."""
    return (frame for frame, _ in _at_rate(path, fps))


def decode_video(path: str | os.PathLike) -> Iterator[av.VideoFrame | UInt8[np.ndarray, "h w 3"]]:
    """The frames of `read_video` as FFmpeg decodes them, not turned; those of a folder or a WebP are RGB arrays."""
    return (frame for frame, _, _ in _decode(Path(path)))


def frames_at(path: str | os.PathLike, numbers: Iterable[int]) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """The frames of a file with these numbers, counted from 0, in increasing order; a number may be repeated.

    Reads up to the last number: from the start or, if the first number is large, from a key frame before it.
    Raises the errors of `read_video`, and ValueError for a number past the file's end.
    """
    path, wanted, done = Path(path), list(numbers), 0
    if wanted and wanted[0] >= FAR:
        # On any error, the loop below reads from the start instead.
        with contextlib.suppress(ValueError):
            for frame in _pick(path, _numbered(path, wanted[0]), wanted):
                yield frame
                done += 1
    yield from _pick(path, enumerate(frame for frame, _, _ in _decode(path)), wanted[done:])


def _pick(
    path: Path, frames: Iterable[tuple[int, av.VideoFrame | np.ndarray]], wanted: list[int]
) -> Iterator[np.ndarray]:
    """The frames whose numbers are `wanted`, in increasing order. Raises ValueError for a number past the end."""
    left = iter(wanted)
    number, count = next(left, None), 0
    if number is None:
        return
    for count, frame in frames:
        while number == count:
            yield _upright(frame)
            number = next(left, None)
        if number is None:
            return
    raise ValueError(f"{path}: has {count + 1} frames, frame {number} is asked for; cut the clip shorter")


def _numbered(path: Path, near: int) -> Iterator[tuple[int, av.VideoFrame | np.ndarray]]:
    """Frames and their numbers, from a key frame before `near`. Raises ValueError if the times are not even."""
    first = 0
    for i, (frame, time, rate) in enumerate(_decode(path, near)):
        number = round(time * rate)
        first = number if i == 0 else first
        if number != first + i or abs(time * rate - number) > 0.1 or first > near:
            raise ValueError(f"{path}: its frames are not evenly spaced")
        yield number, frame


def _at_rate(path: str | os.PathLike, fps: float | None) -> Iterator[tuple[np.ndarray, float]]:
    """The frames of `read_video`, each with the rate in frames per second."""
    if fps is None:
        for frame, _, rate in _decode(Path(path)):
            yield _upright(frame), rate
        return
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"{path}: {fps} frames a second; the rate must be positive, such as 24")
    last, shown, tick, rate = None, 0.0, 0, 0.0
    for frame, time, rate in _decode(Path(path)):
        if not rate:
            raise ValueError(f"{path}: names no rate of its own; read all of its frames, without fps")
        # Halfway between two frames the earlier one is taken, despite rounding.
        while last is not None and tick / fps <= (shown + time) / 2 + ROUNDING:
            yield _upright(last), float(fps)
            tick += 1
        last, shown = frame, time
    while last is not None and (tick == 0 or tick / fps < shown + 1 / rate - ROUNDING):
        yield _upright(last), float(fps)
        tick += 1


def _upright(frame: av.VideoFrame | np.ndarray) -> np.ndarray:
    """The RGB frame turned upright, mirrored ones too: phones store the orientation as metadata."""
    if isinstance(frame, np.ndarray):
        return frame
    rgb = frame.to_ndarray(format="rgb24", interpolation=EXACT)
    try:
        data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV does not know the kind of some other side data
        return np.rot90(rgb, frame.rotation // 90)
    if data is None:
        return rgb
    # (x, y) is shown at (a x + c y, b x + d y).
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].astype(int)
    if abs(b) + abs(c) > abs(a) + abs(d):
        rgb, a, d = rgb.swapaxes(0, 1), c, b
    return rgb[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def _decode(path: Path, near: int = 0) -> Iterator[tuple[av.VideoFrame | np.ndarray, float, float]]:
    """Each frame, its time in seconds (the first at 0), and the average rate, 0 if the file has none.

    With `near`, starts at the last key frame before frame number `near`, if frames are evenly spaced.
    """
    if kind_of(path) == "folder":
        yield from read_folder(path)
        return
    check_readable(path, "a video file, such as clip.mp4")
    if is_webp(path):
        yield from read_webp(path)
        return
    import av

    count, size, start = 0, None, None
    try:
        # An object, as FFmpeg takes some names for protocols. A playlist must not open other files or the network.
        options = {"err_detect": "explode", "protocol_whitelist": "none"}
        with path.open("rb") as file, av.open(file, "r", options=options, buffer_size=BUFFER) as container:
            stream = _video_stream(path, container)
            # By default a decoder guesses missing content, which hides the damage.
            stream.codec_context.options = {"err_detect": "explode"}
            stream.thread_type = "AUTO"
            rate = float(stream.average_rate or stream.guessed_rate or 0)
            if near and rate:
                first = next(container.decode(stream), None)
                start = first.time if first is not None and first.time is not None else 0.0
                container.seek(int((start + (near - 0.5) / rate) / float(stream.time_base or 1)), stream=stream)
            for frame in _frames(path, container, stream, whole=not near):
                if frame.is_corrupt:
                    raise ValueError(f"{path}: frame {count} is damaged; copy or encode the file again")
                if size not in (None, (frame.height, frame.width)):
                    raise ValueError(f"{path}: its frames change size; encode it again at one size")
                size = frame.height, frame.width
                time = frame.time if frame.time is not None else count / rate if rate else 0.0
                start = time if start is None else start
                yield frame, time - start, rate
                count += 1
    except (av.FFmpegError, OSError) as error:
        place = f"after {count} frames" if count else "as video"
        raise ValueError(f"{path}: does not decode {place} ({error.strerror}); copy or encode the file again") from None
    if not count:
        raise ValueError(f"{path}: 0 frames decode of at least 1 declared; copy or encode the file again")


def _video_stream(path: Path, container: InputContainer) -> av.VideoStream:
    """The first video stream that is not the cover of a sound file."""
    from av.stream import Disposition

    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        kinds = sorted({stream.type for stream in container.streams} - {"video"})
        holds = f"only {' and '.join(kinds)}" if kinds else "no stream at all"
        raise ValueError(f"{path}: holds no video, {holds}; name a file with a video stream")
    return streams[0]


def _frames(path: Path, container: InputContainer, stream: av.VideoStream, whole: bool) -> Iterator[av.VideoFrame]:
    """The visible frames. With `whole`, raises ValueError at the end if packets of the index are missing.

    Packets are counted, not frames, as an edit list hides frames, and leaves packets out of the index.
    """
    packets = 0
    for packet in container.demux(stream):
        packets += packet.size > 0
        yield from packet.decode()
    declared = min(stream.frames, len(getattr(stream, "index_entries", ())))
    # A fragmented mp4 declares only its duration; its hidden packets are counted too.
    if not stream.frames and "mp4" in container.format.name and stream.duration and stream.time_base:
        declared = round(float(stream.duration * stream.time_base) * float(stream.average_rate or 0))
    if whole and packets < declared:
        raise ValueError(f"{path}: {packets} frames decode of {declared} declared; copy or encode the file again")
