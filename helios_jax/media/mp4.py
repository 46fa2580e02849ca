"""Writes an mp4 that plays while it grows, and that can be continued later. PyAV is imported when one is opened."""

from __future__ import annotations

import contextlib
import math
import os
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, NoReturn

import numpy as np
from jaxtyping import UInt8

from helios_jax.locations import write_error
from helios_jax.path_checks import check_writable, kind_of

if TYPE_CHECKING:
    import av

CODEC, SUFFIX = "libx264", ".mp4"
# An empty index, then one fragment per frame: the file is complete after every frame.
CONTAINER_OPTIONS = {"movflags": "+frag_every_frame+empty_moov+default_base_moof", "flush_packets": "1"}
# zerolatency: the encoder returns each frame at once, without look-ahead.
CODEC_OPTIONS = {"crf": "17", "preset": "veryfast", "tune": "zerolatency"}
IDR = 5  # type of an H.264 unit that decodes on its own
# ITU-R BT.709 and limited range, as players assume of H.264. FFmpeg's numbers: AVCOL_..._BT709, AVCOL_RANGE_MPEG.
BT709 = LIMITED = 1
MAX_RATE = 2**31 - 1  # frames a second: mp4 and FFmpeg keep 32-bit numbers


class _Output:
    """The file of the muxer, opened at the first byte. After an error it drops all bytes, so that closing cannot fail.

    The muxer gets an object, not a name, as FFmpeg takes names such as `take:1.mp4` for protocols. While `expected` (a
    file to be continued) is set, bytes are only compared with it; `same` is False once they differ.
    """

    def __init__(self, path: Path):
        self._path, self._file, self._failed = path, None, False
        self._size = self._whole = 0
        self.expected: BinaryIO | None = None
        self.same = True

    def write(self, data: bytes) -> int:
        if self._failed:
            return len(data)
        if self.expected is not None:
            self.same = self.same and self.expected.read(len(data)) == data
            self._size += len(data)
            return len(data)
        if self._file is None:
            self._file = self._path.open("r+b" if self._size else "wb", buffering=0)
            self._file.seek(self._size)
            self._file.truncate()
        left = memoryview(data)
        while left:
            left = left[self._file.write(left) :]
        self._size += len(data)
        return len(data)

    def mark(self) -> None:
        """Marks all bytes written so far as whole: `fail` cuts the file back to here."""
        self._whole = self._size

    def fail(self) -> None:
        """Cuts the file to its whole part and drops all that is written later."""
        self._failed = True
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.truncate(self._whole)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class VideoWriter:
    """Writes H.264 into an mp4, frame by frame: `with VideoWriter(path, 24, 384, 640) as video: video.write(frames)`.

    Missing folders of `path` are created. The first frame replaces an existing file. If the process dies, it plays
    up to the frame before the newest. If the disk is full, the frames before stay, and OSError names the path.
    Colours are BT.709 in limited range, and tagged so.

    With `keep`, a file that this class wrote is continued: its first `keep` frames stay, or all if it has fewer, and
    `frames` is their number. The file is unchanged until a frame is written.

    Raises ValueError, in one line and before anything is written, for a suffix that is not .mp4, an odd or non-positive
    size, a rate that the file cannot hold, a path that is not a regular file or cannot be written, and a file that
    cannot be continued because it has another size, rate or encoder.
    """

    takes = "np"

    def __init__(self, path: str | os.PathLike, fps: float, height: int, width: int, keep: int = 0):
        self.path = Path(path)
        if self.path.suffix.lower() != SUFFIX:
            raise ValueError(f"{path}: unknown suffix {self.path.suffix!r}; video is written as {SUFFIX}, name it so")
        if height < 2 or width < 2 or height % 2 or width % 2:
            even = f"{max(2, height + height % 2)}x{max(2, width + width % 2)}"
            raise ValueError(f"{path}: frames of {height}x{width}; H.264 needs even height and width, such as {even}")
        rate = Fraction(fps).limit_denominator(1001) if math.isfinite(fps) else Fraction(0)
        if rate <= 0 or rate.numerator > MAX_RATE:
            raise ValueError(
                f"{path}: {fps} frames a second; the rate must be positive and at most {MAX_RATE}, such as 24"
            )
        check_writable(self.path)
        import av
        from av.video.reformatter import VideoReformatter

        self._size, self._output, self._reformatter = (height, width), _Output(self.path), VideoReformatter()
        self._container = av.open(self._output, "w", format="mp4", options=CONTAINER_OPTIONS)
        self._stream = self._container.add_stream(CODEC, rate=rate, options=CODEC_OPTIONS)
        self._stream.height, self._stream.width, self._stream.pix_fmt = height, width, "yuv420p"
        context = self._stream.codec_context
        context.color_primaries = context.color_trc = context.colorspace = BT709
        context.color_range = LIMITED
        self._time_base = 1 / rate
        self._closed = self._failed = False
        self.frames = 0  # number of frames in the file
        if keep and kind_of(self.path) == "file":
            self._keep(keep)

    def _keep(self, most: int) -> None:
        """Muxes the file's own packets again, to bring the muxer into the state it had, and compares the bytes."""
        import av

        try:
            with self.path.open("rb") as expected, self.path.open("rb") as file, av.open(file, "r") as container:
                self._output.expected = expected
                for packet in container.demux(video=0):
                    encoded = _as_encoded(packet, self._stream)
                    if self.frames == most or encoded is None:
                        break
                    self._container.mux(encoded)
                    self.frames += 1
        except (av.FFmpegError, OSError, IndexError) as error:
            self._refuse(f"does not read as video ({error})")
        self._output.expected = None
        if not self._output.same:
            self._refuse("was written with another size, rate or encoder")

    def _refuse(self, reason: str) -> NoReturn:
        self._output.fail()
        self.close()
        raise ValueError(f"{self.path}: {reason}, and cannot go on; name another file for the rest")

    def write(self, frames: UInt8[np.ndarray, "t h w 3"]) -> None:
        """Appends RGB frames; they are in the file on return. Raises ValueError for another shape or dtype."""
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != (*self._size, 3):
            expected = f"uint8 [t, {self._size[0]}, {self._size[1]}, 3]"
            raise ValueError(f"{self.path}: got frames of {frames.dtype} {list(frames.shape)}; they must be {expected}")
        from av import VideoFrame

        for array in frames:
            rgb = VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            frame = self._reformatter.reformat(
                rgb, format="yuv420p", dst_colorspace=BT709, dst_color_range=LIMITED, threads=1
            )
            frame.color_primaries = frame.color_trc = BT709
            frame.pts, frame.time_base = self.frames, self._time_base
            self._mux(frame)
            self.frames += 1

    def _mux(self, frame: av.VideoFrame | None) -> None:
        """Encodes a frame, or with None completes the stream; the file is whole after it."""
        try:
            self._container.mux(self._stream.encode(frame))
        except OSError as error:
            self._output.fail()
            self._failed = True
            raise write_error(error, self.path) from None
        self._output.mark()

    def close(self) -> None:
        """Completes the file. Later calls do nothing."""
        if self._closed:
            return
        self._closed = True
        try:
            if self.frames and not self._failed:
                self._mux(None)
            self._container.close()
        except OSError as error:
            failed = self._failed
            self._output.fail()
            raise error if failed else write_error(error, self.path) from None
        finally:
            self._container.close()
            self._output.close()

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _as_encoded(packet: av.Packet, stream: av.VideoStream) -> av.Packet | None:
    """A packet of an mp4 as its encoder gave it: each unit after a start code in place of its size; None past the end.

    Also None for a packet whose end is missing in the file.
    """
    from av import Packet

    data, units, begin = bytes(packet), [], 0
    while begin < len(data):
        size = max(1, int.from_bytes(data[begin : begin + 4], "big"))
        units.append(data[begin + 4 : begin + 4 + size])
        begin += 4 + size
    if not data or begin > len(data):
        return None
    encoded = Packet(b"".join(b"\0\0\0\1" + unit for unit in units))
    encoded.stream, encoded.time_base = stream, packet.time_base
    encoded.pts, encoded.dts, encoded.duration = packet.pts, packet.dts, packet.duration
    encoded.is_keyframe = any(unit[0] & 31 == IDR for unit in units)
    return encoded
