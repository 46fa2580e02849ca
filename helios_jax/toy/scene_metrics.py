"""Ground-truth metrics of the larger toy world: does a video show what its caption says, and does it keep showing it?

Shapes are told from the grey background, and from one another, by their hue; the background's texture and movement by
the waves that it is made of. Lengths are pixels of a 64x64 frame, as in `toy.metrics`. A frame in which another shape
may cover a shape is not judged for it.

| metric | of a faithful video | what it is |
| --- | --- | --- |
| present | 1 | share of frames in which a shape's colour covers about the area that it should |
| shape | 1 | share of frames in which the right shape is recognised |
| colour_error | 0 | root mean square, from the nearest hue that has the right name; 0 to 1 |
| direction, speed | 1 | first movement as said; within a factor of 1.6 of the said speed |
| speed_error | 0 | pixels a frame |
| stuck | 0 | share of the time in which a shape moves less than a quarter of its speed |
| repeated | 0 | share of chunks in which a shape moves as in one of the two before (`toy.metrics.repeated`) |
| jump, chunk_jump | 0 | movement beyond the said speed, pixels a frame: all frames, and between chunks only |
| background | 1 | share of frames with the right brightness |
| texture | 1 | share of frames with the right texture |
| texture_contrast | 1 | strength of the texture, relative to the right one |
| pan_error | 0 | difference from the background's movement, pixels a frame of 64x64 |
| border_ratio | about 1 | change of pixels from one chunk to the next, relative to that within chunks |
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, UInt8

from helios_jax.sampling.chunk_frames import ChunkFrames
from helios_jax.toy import scenes, world
from helios_jax.toy.metrics import (
    CHUNKS,
    DRIFT_FRACTION,
    FIRST_FRAMES,
    RECOGNISED,
    SPAN,
    SPEED_TOLERANCE,
    border_ratio,
    repeated,
)
from helios_jax.toy.world import Attributes

# The plane of the colour wheel: from red, green and blue to the two coordinates whose angle is the hue.
PLANE = np.array([[1.0, -0.5, -0.5], [0.0, math.sqrt(0.75), -math.sqrt(0.75)]])
# Widest distance, in degrees, of a pixel's hue from the band of the colour that it is counted to.
HUE_TOLERANCE = 20.0
COVERED = (0.5, 1.6)  # least and greatest area of a shape that is there, relative to the right one
BRIGHTNESS_TOLERANCE = 0.1  # of full scale: the two brightnesses are 0.27 apart
FAINT = 0.4  # of the right contrast: a fainter texture counts as plain
# Scores whose course over a long video shows its drift.
SECONDS = ("present", "shape", "colour_error", "stuck", "background", "texture_contrast", "pan_error")


@dataclass(frozen=True)
class Track:
    """Measurements of a shape in each frame: its area, position, form and colour.

    `area` is relative to the right shape's, `position` (y, x) in pixels of a 64x64 frame, `judged` False where another
    shape may cover it.
    """

    area: Float[np.ndarray, " t"]
    position: Float[np.ndarray, "t 2"]
    correlation: Float[np.ndarray, "t shapes"]  # with the template of each shape there, in the order of world.SHAPES
    colour: Float[np.ndarray, "t 3"]  # mean RGB, 0 to 1
    judged: Bool[np.ndarray, " t"]


@dataclass(frozen=True)
class Ground:
    """Measurements of the background in each frame: mean brightness, 0 to 1, and the waves of its texture.

    `waves` are complex amplitudes, relative to the right contrast, of the waves along x, along y, and along the two
    diagonals, whose sum is a checkered texture.
    """

    brightness: Float[np.ndarray, " t"]
    waves: np.ndarray  # complex [t, 4]


def rollout(
    video: UInt8[np.ndarray, "t h w 3"], caption: str, fps: int, chunks: ChunkFrames = CHUNKS
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """The metrics of a video against its caption, and some of them for each of its seconds of `fps` frames.

    Besides the table's metrics there are `NAME_end`, of the last sixth, and `NAME_drift`, the change since the first.
    """
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3 or len(video) < 2:
        raise ValueError(f"a video is uint8 [t >= 2, h, w, 3], got {video.dtype} {list(video.shape)}")
    shapes, background = scenes.parse_caption(caption)
    tracks, ground = measure(video, shapes)

    def part(frames: slice) -> dict[str, float]:
        cut = [Track(*(getattr(track, name)[frames] for name in Track.__dataclass_fields__)) for track in tracks]
        below = Ground(ground.brightness[frames], ground.waves[frames])
        return _of_shapes(cut, shapes) | _of_ground(below, background)

    values, sixth = part(slice(None)), max(len(video) // DRIFT_FRACTION, 2)
    values |= _of_motion(tracks, shapes, chunks) | {"border_ratio": border_ratio(video, chunks)}
    first, last = part(slice(0, sixth)), part(slice(-sixth, None))
    values |= {f"{name}_end": last[name] for name in SECONDS}
    values |= {f"{name}_drift": abs(last[name] - first[name]) for name in SECONDS}
    each = [part(slice(i, i + fps)) for i in range(0, len(video) - fps + 1, fps)]
    return values, {name: [one[name] for one in each] for name in SECONDS}


def measure(video: UInt8[np.ndarray, "t h w 3"], shapes: Sequence[Attributes]) -> tuple[list[Track], Ground]:
    """Finds each of `shapes` by its colour in each frame, and measures the background behind them."""
    height, width = video.shape[1:3]
    pixels = video.astype(np.float32) / 255
    masks = _masks(pixels, shapes)
    grid = np.moveaxis(np.mgrid[:height, :width], 0, -1) + 0.5
    unit = world.NOMINAL_SIZE / min(height, width)
    centres = [np.einsum("thw,hwp->tp", m, grid) / np.maximum(m.sum((1, 2)), 1e-3)[:, None] for m in masks]
    tracks = []
    for i, (shape, mask, centre) in enumerate(zip(shapes, masks, centres)):
        templates = [world.coverage(name, centre, height, width, scenes.SIZE) for name in world.SHAPES]
        own = world.coverage(shape.shape, np.array([[height / 2, width / 2]]), height, width, scenes.SIZE).sum()
        judged = np.ones(len(video), bool)
        for other, theirs in list(zip(shapes, centres))[i + 1 :]:  # those in front
            reach = (_extent(shape, height, width) + _extent(other, height, width)) / 2
            judged &= (np.abs(centre - theirs) > reach + 1).any(1)
        tracks.append(
            Track(
                area=mask.sum((1, 2)) / own,
                position=centre * unit,
                correlation=np.stack([_correlation(mask, template) for template in templates], 1),
                colour=np.einsum("thwc,thw->tc", pixels, mask**4) / np.maximum((mask**4).sum((1, 2)), 1e-3)[:, None],
                judged=judged,
            )
        )
    return tracks, _ground(pixels, np.max(masks, axis=0))


def _masks(pixels: Float[np.ndarray, "t h w 3"], shapes: Sequence[Attributes]) -> list[Float[np.ndarray, "t h w"]]:
    """The share of each pixel, 0 to 1, that each shape covers, by its chroma: the colour without its brightness."""
    plane = PLANE.astype(np.float32)
    chroma = pixels @ plane.T
    strength = np.linalg.norm(chroma, axis=-1)
    hue = np.degrees(np.arctan2(chroma[..., 1], chroma[..., 0]))
    far = np.stack([_hue_distance(hue, shape.colour) for shape in shapes])
    own = far.argmin(0)
    return [
        np.where((own == i) & (far[i] < HUE_TOLERANCE), np.clip(strength / _full(shape.colour, plane), 0, 1), 0)
        for i, shape in enumerate(shapes)
    ]


def _full(colour: str, plane: np.ndarray) -> float:
    low, high = world.COLOURS[colour]
    return float(np.linalg.norm(plane @ (world.hue_to_rgb((low + high) / 2) / 255)))


def _hue_distance(hue: Float[np.ndarray, "t h w"], colour: str) -> Float[np.ndarray, "t h w"]:
    """Degrees from the band of a colour; 0 inside it."""
    low, high = world.COLOURS[colour]
    return np.maximum(0, np.abs((hue - (low + high) / 2 + 180) % 360 - 180) - (high - low) / 2)


def _extent(shape: Attributes, height: int, width: int) -> Float[np.ndarray, "2"]:
    return world.extent(shape.shape, height, width, scenes.SIZE)


def _correlation(mask: Float[np.ndarray, "t h w"], template: Float[np.ndarray, "t h w"]) -> Float[np.ndarray, " t"]:
    a, b = (x - x.mean((1, 2), keepdims=True) for x in (mask, template))
    return (a * b).sum((1, 2)) / np.maximum(np.linalg.norm(a, axis=(1, 2)) * np.linalg.norm(b, axis=(1, 2)), 1e-6)


def _ground(pixels: Float[np.ndarray, "t h w 3"], covered: Float[np.ndarray, "t h w"]) -> Ground:
    """Measures the background on pixels that no shape covers; the waves are fitted to these pixels alone."""
    seen = (covered < 0.02).astype(np.float32)
    grey = pixels.mean(-1)
    count = np.maximum(seen.sum((1, 2)), 1)
    brightness = (grey * seen).sum((1, 2)) / count
    rest = (grey - brightness[:, None, None]) * seen
    height, width = grey.shape[1:]
    scale = scenes.NOMINAL_SIZE / min(height, width) * 2 * np.pi / scenes.PERIOD
    y, x = (np.exp(-1j * (np.arange(n) + 0.5) * scale) for n in (height, width))
    waves = (x[None, :] + 0 * y[:, None], y[:, None] + 0 * x[None, :], y[:, None] * x, y[:, None] * x.conj())
    found = [2 * (rest * wave).sum((1, 2)) / count for wave in waves]
    return Ground(brightness, np.stack(found, 1) * 255 / scenes.CONTRAST)


def _of_shapes(tracks: Sequence[Track], shapes: Sequence[Attributes]) -> dict[str, float]:
    """Means over the shapes of the metrics of any part of a video."""
    rows = []
    for track, shape in zip(tracks, shapes):
        there = (track.area > COVERED[0]) & (track.area < COVERED[1])
        judged = track.judged if track.judged.any() else np.ones(len(track.judged), bool)
        index = list(world.SHAPES).index(shape.shape)
        right = (track.correlation.argmax(1) == index) & (track.correlation[:, index] > RECOGNISED)
        wanted = np.array([_wanted(colour, shape.colour) for colour in track.colour])
        errors = np.where(there, np.sqrt(((track.colour - wanted) ** 2).mean(1)), 1.0)
        rows.append(
            {
                "present": there[judged].mean(),
                "shape": (right & there)[judged].mean(),
                "colour_error": errors[judged].mean(),
                "stuck": _stuck(track, shape),
            }
        )
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def _of_motion(tracks: Sequence[Track], shapes: Sequence[Attributes], chunks: ChunkFrames) -> dict[str, float]:
    """Means over the shapes of the metrics of whole videos."""
    rows = []
    for track, shape in zip(tracks, shapes):
        speed, true = float(np.median(np.linalg.norm(_movement(track), axis=1))), world.SPEEDS[shape.speed]
        steps = np.linalg.norm(np.diff(track.position, axis=0), axis=1)
        both = track.judged[1:] & track.judged[:-1]
        excess = np.where(both, np.maximum(steps - true, 0), 0)
        row = {"direction": float(_moves(track, shape.direction)), "speed_error": abs(speed - true)}
        row["speed"] = float(speed > 0 and abs(math.log(speed / true)) < SPEED_TOLERANCE)
        row["jump"] = float(excess.sum() / max(both.sum(), 1))
        row["repeated"] = repeated(track.position, chunks)
        border = both[chunks.borders]
        row["chunk_jump"] = float(excess[chunks.borders].sum() / max(border.sum(), 1))
        rows.append(row)
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def _of_ground(ground: Ground, words: scenes.Background) -> dict[str, float]:
    """The background's metrics of any part of a video."""
    right = scenes.BRIGHTNESS[words.brightness] / 255
    x, y, *diagonals = np.abs(ground.waves).T
    checkered = sum(diagonals)
    strengths = {"plain": np.full(len(x), FAINT), "striped": x, "barred": y, "checkered": checkered}
    names = list(strengths)
    found = np.stack(list(strengths.values())).argmax(0)
    contrast = strengths[words.texture] if words.texture != "plain" else 1 - np.maximum(np.maximum(x, y), checkered)
    return {
        "background": float((np.abs(ground.brightness - right) < BRIGHTNESS_TOLERANCE).mean()),
        "texture": float((found == names.index(words.texture)).mean()),
        "texture_contrast": float(contrast.mean()),
        "pan_error": _pan_error(ground, words),
    }


def _pan_error(ground: Ground, words: scenes.Background) -> float:
    """Difference of the texture's movement from the said pan; all of the pan if the video shows no texture."""
    if words.texture == "plain" or len(ground.brightness) < 2:
        return 0.0
    columns = {"striped": [(0, (0, 1))], "barred": [(1, (1, 0))], "checkered": [(2, (1, 1)), (3, (1, -1))]}
    moved = np.zeros((len(ground.brightness) - 1, 2))
    for column, wave in columns[words.texture]:
        turns = ground.waves[1:, column] * ground.waves[:-1, column].conj()
        moved += np.outer(-np.angle(turns) / (2 * np.pi) * scenes.PERIOD, wave) / len(columns[words.texture])
    unit = world.NOMINAL_SIZE / scenes.NOMINAL_SIZE
    wanted = np.array(scenes.PANS[words.pan] if words.pan else (0.0, 0.0))
    return float(np.linalg.norm(np.median(moved, axis=0) - wanted) * unit)


def _wanted(colour: Float[np.ndarray, "3"], name: str) -> Float[np.ndarray, "3"]:
    """The colour, 0 to 1, in the band of `name` whose hue is nearest to the hue of `colour`."""
    x, y = PLANE @ colour
    low, high = world.COLOURS[name]
    middle, half = (low + high) / 2, (high - low) / 2
    offset = (math.degrees(math.atan2(y, x)) - middle + 180) % 360 - 180
    return world.hue_to_rgb(middle + min(max(offset, -half), half)) / 255


def _movement(track: Track) -> Float[np.ndarray, "spans 2"]:
    """Velocity (y, x) over each span of SPAN frames at whose ends the shape is judged; over all if there is none."""
    span = min(SPAN, len(track.position) - 1)
    moved = (track.position[span:] - track.position[:-span]) / span
    good = track.judged[span:] & track.judged[:-span]
    return moved[good] if good.any() else moved


def _moves(track: Track, direction: str) -> bool:
    """True if the first movement is within 22.5 degrees of a direction, and at least a quarter of the slowest speed."""
    first = Track(*(getattr(track, name)[:FIRST_FRAMES] for name in Track.__dataclass_fields__))
    velocity = np.median(_movement(first), axis=0)
    speed = float(np.linalg.norm(velocity))
    if speed < min(world.SPEEDS.values()) / 4:
        return False
    return max(float(velocity @ np.array(u)) / speed for u in world.DIRECTIONS[direction]) > math.cos(math.pi / 8)


def _stuck(track: Track, shape: Attributes) -> float:
    speeds = np.linalg.norm(_movement(track), axis=1)
    return float((speeds < world.SPEEDS[shape.speed] / 4).mean())
