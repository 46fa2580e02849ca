"""Pictures as a video: an animated WebP, and a folder of PNG frames as `FrameWriter` writes it."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

from helios_jax.media.image import DAMAGED, read_image, to_rgb
from helios_jax.messages import one_line

# RGB frame, time in seconds, frames per second (0: unknown)
Timed = tuple[np.ndarray, float, float]
STILL = 100  # milliseconds that a frame without a duration is shown, as browsers do


def is_webp(path: Path) -> bool:
    """Tells a WebP by its first bytes. FFmpeg reads only still ones."""
    with path.open("rb") as file:
        head = file.read(12)
    return head[:4] == b"RIFF" and head[8:] == b"WEBP"


def read_webp(path: Path) -> Iterator[Timed]:
    """The frames of an animated WebP. Raises ValueError, in one line, for a damaged file."""
    try:
        with Image.open(path) as image:
            # The rate follows from all durations, so that the file is decoded twice. Animations are short.
            durations = [frame.info.get("duration") or STILL for frame in ImageSequence.Iterator(image)]
            rate, time = 1000 * len(durations) / sum(durations), 0.0
            for frame, duration in zip(ImageSequence.Iterator(image), durations, strict=True):
                yield np.asarray(to_rgb(frame, str(path))), time, rate
                time += duration / 1000
    except DAMAGED as error:
        reason = one_line(str(error).replace(f"{str(path)!r}", ""))
        raise ValueError(f"{path}: does not decode as video ({reason}); copy or encode the file again") from None


def read_folder(path: Path) -> Iterator[Timed]:
    """The frames of a folder, 000000.png and on. Raises ValueError for no frames, a gap, and a change of size."""
    files = {int(file.stem): file for file in path.glob("*.png") if file.stem.isdecimal()}
    if not files:
        raise ValueError(f"{path}: is a folder without frames; name a video file or a folder of 000000.png and on")
    size, first = None, min(files)
    for number in range(first, max(files) + 1):
        if number not in files:
            raise ValueError(f"{path}: frame {number:06d}.png is missing; number the frames without a gap")
        frame = read_image(files[number])
        if size not in (None, frame.shape):
            raise ValueError(f"{path}: its frames change size; save them at one size")
        size = frame.shape
        yield frame, 0.0, 0.0
