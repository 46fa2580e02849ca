"""Frames of a video as the benchmark's metrics see them, decoded one by one: a video is never in memory as a whole.

Upstream's scripts read a video in three ways, and scores depend on them: `Frame` has all three. `scaled` equals what
video-reader-rs 0.4.1 gives on a machine with AVX2, bit for bit.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import av
import av.filter
import numpy as np
from av.video.plane import VideoPlane
from jaxtyping import Int16, UInt8

from helios_jax.media.video import decode_video

BT709, FULL_RANGE = 1, 2  # FFmpeg's numbers of a matrix and a range
LEAST = 16  # pixels of a side, which the optical flow and its map need
JUDGED_SIDE = 512  # pixels of a judged picture's longer side
Size = tuple[int, int]


def target_size(height: int, width: int, box: Size) -> Size:
    """Height and width at which the metrics see a video: one side equals that of `box`, and both are even.

    The proportions stay, so that 480x832 becomes 368x640 in a box of 384x640.
    """
    ratio = width / height
    size = (int(box[1] / ratio), box[1]) if box[1] > box[0] else (box[0], int(box[0] * ratio))
    return _even(size[0]), _even(size[1])


def _even(pixels: int) -> int:
    return int(round(pixels / 2) * 2)


@dataclass
class Frame:
    """A decoded frame, its number from 0, the size that the metrics see, and the scaling of planes to it."""

    number: int
    source: av.VideoFrame
    size: Size
    scale: Callable[[av.VideoFrame], av.VideoFrame]

    @cached_property
    def scaled(self) -> UInt8[np.ndarray, "h w 3"]:
        """RGB for the aesthetic score, motion and semantics: planes are scaled first, and chroma is not smoothed."""
        return planes_to_rgb(self.scale(self.source))

    @cached_property
    def resized(self) -> UInt8[np.ndarray, "h w 3"]:
        """RGB for the smoothness score: OpenCV's bilinear scaling of the whole picture."""
        import cv2

        return cv2.resize(self.rgb, self.size[::-1])

    @cached_property
    def picture(self) -> UInt8[np.ndarray, "h w 3"]:
        """RGB for the judge: the longer side is 512 pixels."""
        import cv2

        height, width = self.rgb.shape[:2]
        longer = max(height, width)
        size = (int(width * JUDGED_SIDE / longer), int(height * JUDGED_SIDE / longer))
        return cv2.resize(self.rgb, size, interpolation=cv2.INTER_AREA)

    @cached_property
    def rgb(self) -> UInt8[np.ndarray, "h w 3"]:
        """RGB at the video's own size."""
        return self.source.to_ndarray(format="rgb24")


def read_frames(path: Path, box: Size, limit: int | None = None) -> Iterator[Frame]:
    """The frames of a video file, at most `limit`; raises ValueError, in one line, for a damaged file."""
    size, scale = None, None
    for number, frame in enumerate(islice(decode_video(path), limit)):
        if not isinstance(frame, av.VideoFrame):
            raise ValueError(f"{path}: is no video file; name an mp4")
        if size is None or scale is None:
            size = target_size(frame.height, frame.width, box)
            if min(size) < LEAST:
                raise ValueError(
                    f"{path}: {frame.width}x{frame.height} pixels become {size[1]}x{size[0]} here; each side must have"
                    f" {LEAST} or more"
                )
            scale = _scaler(frame, size)
        yield Frame(number, frame, size, scale)


def _scaler(first: av.VideoFrame, size: Size) -> Callable[[av.VideoFrame], av.VideoFrame]:
    """Scaling by FFmpeg's filter: `VideoFrame.reformat` asks for accurate rounding, which gives other pixels."""
    graph = av.filter.Graph()
    source = graph.add_buffer(width=first.width, height=first.height, format=first.format, time_base=first.time_base)
    filters = [("scale", f"{size[1]}:{size[0]}:flags=fast_bilinear"), ("format", "yuv420p"), ("buffersink", None)]
    graph.link_nodes(source, *(graph.add(name, text) for name, text in filters)).configure()

    def scale(frame: av.VideoFrame) -> av.VideoFrame:
        graph.push(frame)
        scaled = graph.pull()
        assert isinstance(scaled, av.VideoFrame)
        return scaled

    return scale


def count_frames(path: Path) -> int:
    """The number of frames that decode; raises ValueError, in one line, for a damaged file."""
    return sum(1 for _ in decode_video(path))


def planes_to_rgb(frame: av.VideoFrame) -> UInt8[np.ndarray, "h w 3"]:
    """RGB of a yuv420p frame by video-reader-rs' integer arithmetic: every term is rounded on its own, from 10 bits.

    Without tags a frame is BT.601 in limited range.
    """
    luma, red, blue, green_u, green_v = _tables(int(frame.colorspace) == BT709, int(frame.color_range) == FULL_RANGE)
    y, u, v = (_plane(plane) for plane in frame.planes)
    light = luma[y]
    rows, columns = y.shape

    def wide(chroma: np.ndarray) -> np.ndarray:
        return chroma.repeat(2, 0)[:rows].repeat(2, 1)[:, :columns]

    channels = light + wide(red[v]), light - wide(green_u[u] + green_v[v]), light + wide(blue[u])
    return np.stack(channels, -1).clip(0, 255).astype(np.uint8)


def _plane(plane: VideoPlane) -> UInt8[np.ndarray, "h w"]:
    return np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]


@functools.cache
def _tables(bt709: bool, full_range: bool) -> tuple[Int16[np.ndarray, " 256"], ...]:
    """Tables from a plane's bytes to their terms of a pixel: luma, red by V, blue by U, green by U and by V."""
    red, blue = (0.2126, 0.0722) if bt709 else (0.299, 0.114)
    green = 1 - red - blue
    y_scale, scale = (1.0, 1.0) if full_range else (255 / 219, 255 / 224)
    low = 0 if full_range else 16
    levels = np.arange(256)

    def term(levels: np.ndarray, factor: float) -> np.ndarray:
        return ((levels * round(factor * 2**13) + 2**14) >> 15).astype(np.int16)

    def ten_bits(levels: np.ndarray) -> np.ndarray:
        return levels << 2 | levels >> 6

    chroma = ten_bits(levels) - ten_bits(levels)[128]
    to_red, to_blue = 2 * (1 - red) * scale, 2 * (1 - blue) * scale
    factors = to_red, to_blue, to_blue * blue / green, to_red * red / green
    return term(ten_bits((levels - low).clip(0)), y_scale), *(term(chroma, factor) for factor in factors)
