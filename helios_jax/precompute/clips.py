"""Video clips from upstream's JSON lists: the file, the part of it, the size and the caption.

A list holds one object per clip:

    {"path": "videos/1.mp4", "cut": [0, 129], "crop": [0, 832, 0, 480], "fps": 24.0, "num_frames": 129,
     "resolution": {"height": 480, "width": 832}, "cap": ["A cat ..."]}

`cut` holds the first frame and the end (exclusive); default: all `num_frames`. `crop` is left, right, top, bottom in
pixels; default: all of `resolution`. The first of several captions is used. `path` is relative to the list's folder.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from helios_jax.config_types import unreadable
from helios_jax.data.shards import Rejected
from helios_jax.locations import is_remote, local_copy, location
from helios_jax.media.video import frames_at
from helios_jax.messages import one_line

Size = tuple[int, int]
# The sizes (height, width) that upstream sorts clips into.
SIZES: tuple[Size, ...] = (
    (768, 320), (768, 384), (640, 384), (768, 512), (576, 448), (512, 512),
    (448, 576), (512, 768), (384, 640), (384, 768), (320, 768),
)  # fmt: skip
# 23.976 frames per second count as 24.
RATE_TOLERANCE = 0.01


@dataclass(frozen=True)
class Selection:
    """Rules that select clips from a list.

    Attributes:
        sizes: allowed (height, width); a clip whose shape is nearer to another of `SIZES` is refused.
        fps: frames per second, sampled from a faster clip; None takes every frame.
        chunk_frames: frames per chunk; frames after the last whole chunk are not used.
        min_frames, max_frames: shorter clips are refused; of longer clips the first frames are used.
        caption_key: the field of a clip that holds its caption or captions.
    """

    sizes: tuple[Size, ...] = ((384, 640),)
    fps: float | None = None
    chunk_frames: int = 33
    min_frames: int = 121
    max_frames: int | None = None
    caption_key: str = "cap"

    def __post_init__(self):
        if not self.sizes:
            raise ValueError("--size: give at least one")
        if self.fps is not None and not (math.isfinite(self.fps) and self.fps > 0):
            raise ValueError(f"--fps is {self.fps}: it must be positive, such as 24")
        for name in ("min_frames", "max_frames"):
            value = getattr(self, name)
            if value is not None and value < self.chunk_frames:
                option = "--" + name.replace("_", "-")
                raise ValueError(f"{option} is {value}: a chunk has {self.chunk_frames}, so give at least as many")


@dataclass(frozen=True)
class Clip:
    """Frames `first`, `first + step`, ... of a file, `chunks` times `chunk_frames` of them, cut out and resized."""

    id: str
    file: str
    caption: str
    first: int
    step: float
    chunks: int
    chunk_frames: int
    crop: tuple[int, int, int, int]  # left, right, top, bottom
    size: Size

    @property
    def bucket(self) -> str:
        return "{}x{}".format(*self.size)


def read_lists(lists: Sequence[Path], root: Path | None, selection: Selection) -> tuple[list[Clip], list[Rejected]]:
    """The clips of JSON files in order, and the entries that are unusable according to the file.

    `root` is the folder that paths are relative to, by default each file's own. Raises FileNotFoundError or ValueError
    for a file that is not such a list.
    """
    clips, rejected = [], []
    for path in lists:
        for number, entry in enumerate(_read_json(path)):
            name = f"{path.name}[{number}]"
            try:
                clips.append(_clip(entry, root or path.parent, selection))
            except ValueError as error:
                place = entry.get("path") if isinstance(entry, dict) else None
                rejected.append(Rejected(str(place or name), f"{error} ({name})"))
    return clips, rejected


def read_clip(clip: Clip) -> UInt8[np.ndarray, "k f h w 3"]:
    """A clip's chunks at its size. Raises FileNotFoundError or ValueError, in one line, for an unusable file."""
    count = clip.chunks * clip.chunk_frames
    out = np.empty((count, *clip.size, 3), np.uint8)
    with local_copy(location(clip.file)) as file:
        for i, frame in enumerate(frames_at(file, _numbers(clip.first, clip.step, count))):
            out[i] = fit(frame, clip.crop, clip.size)
    return out.reshape(clip.chunks, clip.chunk_frames, *clip.size, 3)


def fit(
    frame: UInt8[np.ndarray, "h w 3"], crop: tuple[int, int, int, int], size: Size
) -> UInt8[np.ndarray, "height width 3"]:
    """The centre of the crop, cut to the proportions of `size` and resized to it bilinearly (with antialiasing)."""
    left, right, top, bottom = crop
    height, width = frame.shape[:2]
    if right > width or bottom > height:
        raise ValueError(f"crop {list(crop)} (left, right, top, bottom) is not within its {width} x {height} pixels")
    high, wide, ratio = bottom - top, right - left, size[0] / size[1]
    if high / wide >= ratio:
        keep = max(1, int(wide * ratio))
        top += (high - keep) // 2
        bottom = top + keep
    else:
        keep = max(1, int(high / ratio))
        left += (wide - keep) // 2
        right = left + keep
    image = Image.fromarray(np.ascontiguousarray(frame[top:bottom, left:right]))
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR))


def nearest_size(height: int, width: int, sizes: Sequence[Size] = SIZES) -> Size:
    """The size with the nearest proportions, by upstream's measure; the last on a tie."""
    return min(reversed(sizes), key=lambda size: abs(height * size[1] - width * size[0]))


def _clip(entry: Any, root: Path, selection: Selection) -> Clip:
    """Raises ValueError for an entry that cannot be used."""
    if not isinstance(entry, dict):
        raise ValueError(f"is not an object but {json.dumps(entry)[:50]}")
    path = entry.get("path")
    if not isinstance(path, str) or not path:
        raise ValueError("has no path")
    caption = entry.get(selection.caption_key)
    caption = caption[0] if isinstance(caption, list) and caption else caption
    if not isinstance(caption, str) or not caption.strip():
        raise ValueError(f"has no caption {selection.caption_key!r}")
    for key, text in (("path", path), (selection.caption_key, caption)):
        if wrong := unreadable(text, key):
            raise ValueError(wrong)
    first, last = _integers(entry, "cut", 2) or (0, _number(entry, "num_frames"))
    if not 0 <= first < last:
        raise ValueError(f"cut [{first}, {last}] (from, to) holds no frame")
    resolution = entry.get("resolution")
    crop = _integers(entry, "crop", 4)
    if crop is None:
        sides = resolution if isinstance(resolution, dict) else {}
        crop = (0, _number(sides, "width"), 0, _number(sides, "height"))
    left, right, top, bottom = crop
    if not (0 <= left < right and 0 <= top < bottom):
        raise ValueError(f"crop {list(crop)} (left, right, top, bottom) holds no pixel")
    step = _step(entry.get("fps"), selection.fps)
    frames = int((last - first - 1) / step + 1e-6) + 1
    if frames < selection.min_frames:
        raise ValueError(f"{frames} frames are fewer than --min-frames {selection.min_frames}")
    return Clip(
        id=f"{Path(path).with_suffix('')}_{first}-{last}",
        file=str(location(path) if is_remote(path) else root / path),
        caption=caption,
        first=first,
        step=step,
        chunks=min(frames, selection.max_frames or frames) // selection.chunk_frames,
        chunk_frames=selection.chunk_frames,
        crop=(left, right, top, bottom),
        size=_size(bottom - top, right - left, selection.sizes),
    )


def _size(height: int, width: int, sizes: tuple[Size, ...]) -> Size:
    """One of `sizes`, which are a choice from upstream's table or the user's own table."""
    table = SIZES if set(sizes) <= set(SIZES) else sizes
    size = nearest_size(height, width, table)
    if size not in sizes:
        raise ValueError(f"{height} x {width} pixels (height x width) are of the shape {size[0]}x{size[1]}, no --size")
    return size


def _step(clip_fps: Any, fps: float | None) -> float:
    """Frames of the file per sampled frame."""
    if fps is None:
        return 1.0
    if not isinstance(clip_fps, int | float) or not math.isfinite(clip_fps) or clip_fps <= 0:
        raise ValueError(f"its fps is {clip_fps!r}: --fps needs its rate")
    step = clip_fps / fps
    if step < 1 - RATE_TOLERANCE:
        raise ValueError(f"its {clip_fps:g} frames a second are fewer than --fps {fps:g}")
    return max(1.0, step)


def _numbers(first: int, step: float, count: int) -> list[int]:
    """The number of the frame nearest to each instant; the earlier frame on a tie."""
    return [first + math.ceil(k * step - 0.5 - 1e-6) for k in range(count)]


def _integers(entry: dict[str, Any], key: str, count: int) -> tuple[int, ...] | None:
    value = entry.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != count or any(not _whole(x) for x in value):
        raise ValueError(f"{key} must be {count} whole numbers, got {json.dumps(value)[:50]}")
    return tuple(int(x) for x in value)


def _number(entry: dict[str, Any], key: str) -> int:
    if not _whole(entry.get(key)):
        raise ValueError(f"{key} must be a whole number, got {json.dumps(entry.get(key))[:50]}")
    return int(entry[key])


def _whole(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) and x == int(x)


def _read_json(path: Path) -> list[Any]:
    try:
        entries = json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; name a JSON list of clips") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: is not a JSON list of clips ({one_line(error)})") from None
    if not isinstance(entries, list):
        raise ValueError(f"{path}: must be a JSON list of clips, not {type(entries).__name__}")
    return entries
