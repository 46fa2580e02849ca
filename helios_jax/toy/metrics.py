"""Ground-truth metrics of the toy world: does a video show what its caption says, and does it keep showing it?

`measure` reads a video without knowing its caption, `score` compares that with the caption's words (or with a `Scene`,
which also fixes the hue and the path), `aggregate` averages over videos and adds the values of the first and the last
sixth of the frames, whose difference is the drift. Colours are fractions of full scale, lengths are pixels of a 64x64
frame.

| metric | of a faithful video | what it is |
| --- | --- | --- |
| shape, colour, background | 1 | share of frames in which it is recognised |
| shape_correlation | > .9 | best match with the right shape's template |
| colour_error, background_error | 0 | root mean square; the colour's from the nearest hue that has the right name |
| contrast | 1 | distance of shape and background colour, relative to the right one |
| direction | 1 | first movement as said (1 or 0) |
| speed | 1 | within a factor of 1.6 of the said speed (1 or 0) |
| speed_error | 0 | pixels a frame |
| jump | 0 | movement beyond the said speed, pixels a frame |
| chunk_jump, start_jump | 0 | the jump between chunks only, and in the first eight steps of chunks |
| colour_shift | 0 | distance between the shape's mean colours of the first and the last sixth |
| position_error | 0 | pixels; only against a `Scene` |
"""

import colorsys
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Float, UInt8

from helios_jax.sampling.chunk_frames import ChunkFrames
from helios_jax.toy import world as toy

# Lowest correlation at which a shape counts as recognised: two different shapes reach at most 0.75, noise 0.2.
RECOGNISED = 0.8
# Smallest differences between a named colour's channels, and from the background, as shares of full scale.
COLOURED = 0.2
BACKGROUND_TOLERANCE = 0.1
# Frames that show the first movement: no scene bounces sooner.
FIRST_FRAMES = 12
# Movement is measured over this many frames, so that the autoencoder's time compression does not matter.
SPAN = 4
# The geometric mean of the world's two speeds, as a ratio.
SPEED_TOLERANCE = math.log(max(toy.SPEEDS.values()) / min(toy.SPEEDS.values())) / 2
DRIFT_FRACTION = 6
# Frames, two latent ones, in which a chunk may still correct the position that it began with.
START_STEPS = 8
# Pixels between two paths that count as one, and the chunks before that are compared: a shape that bounces is back at
# the same place after a period, which one or two chunks never are in both worlds, three can be.
REPEAT_DISTANCE, REPEATS = 1.0, 2
CHUNKS = ChunkFrames(toy.CHUNK_FRAMES, toy.CHUNK_FRAMES)
# Scores whose course over a long video shows its drift.
SECONDS = ("shape", "colour_error", "contrast", "background_error", "speed_error", "stuck")


@dataclass(frozen=True)
class Track:
    """Measurements of each frame, independent of the caption."""

    correlation: Float[np.ndarray, "t shapes"]  # best match with each template, in the order of toy.SHAPES
    position: Float[np.ndarray, "t 2"]  # (y, x) of the best shape, pixels of a 64x64 frame
    foreground: Float[np.ndarray, "t 3"]  # mean RGB inside the best shape, 0 to 1
    background: Float[np.ndarray, "t 3"]  # mean RGB away from it
    unevenness: Float[np.ndarray, " t"]  # standard deviation of the background, over pixels and channels

    def __getitem__(self, frames: slice) -> "Track":
        return Track(*(getattr(self, field.name)[frames] for field in fields(self)))

    def __len__(self) -> int:
        return len(self.position)


def measure(video: UInt8[np.ndarray, "t h w 3"]) -> Track:
    """Finds the shape in each frame by template correlation, and the colours inside and away from it."""
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3 or len(video) < 2:
        raise ValueError(f"a video is uint8 [t >= 2, h, w, 3], got {video.dtype} {list(video.shape)}")
    height, width = video.shape[1:3]
    pixels = video.astype(np.float32) / 255
    # The background covers more than half of the frame, so the median pixel is a background pixel.
    middle = np.median(pixels.reshape(len(video), -1, 3), axis=1)
    distance = np.linalg.norm(pixels - middle[:, None, None], axis=-1)
    correlation, peaks = _match(distance)
    best = correlation.argmax(1)
    peak = peaks[np.arange(len(video)), best]

    extents = np.array([toy.extent(shape, height, width) for shape in toy.SHAPES])[best]
    window = _around(peak, extents / 2 + 2, height, width)
    # The centre of mass is exact to a fraction of a pixel; a floor keeps noise from pulling it to the window's centre.
    weight = np.maximum(distance - 2 * np.median(distance, axis=(1, 2), keepdims=True), 0) * window
    mass = weight.sum((1, 2))
    grid = np.moveaxis(np.mgrid[:height, :width], 0, -1) + 0.5
    centre = np.einsum("thw,hwp->tp", weight, grid) / np.maximum(mass, 1e-6)[:, None]
    centre = np.where(mass[:, None] > 1e-3, centre, peak)

    inside = np.zeros_like(distance)
    for i, shape in enumerate(toy.SHAPES):
        rows = best == i
        inside[rows] = toy.coverage(shape, centre[rows], height, width) > 0.99
    outside = (~window).astype(np.float32)
    background = _mean(pixels, outside)
    variance = _mean((pixels - background[:, None, None]) ** 2, outside).mean(1)
    return Track(
        correlation=correlation,
        position=centre * toy.NOMINAL_SIZE / min(height, width),
        foreground=_mean(pixels, inside),
        background=background,
        unevenness=np.sqrt(variance),
    )


def score(
    video: UInt8[np.ndarray, "t h w 3"], target: toy.Attributes, chunks: ChunkFrames = CHUNKS
) -> dict[str, float]:
    """The metrics of a whole video (table above) against a caption's words or a `Scene`.

    `chunks` are the frames that were generated together; `chunk_jump` needs more than one chunk.
    """
    return _score(measure(video), target, chunks)


def aggregate(
    videos: Iterable[UInt8[np.ndarray, "t h w 3"]],
    targets: Iterable[toy.Attributes],
    chunks: ChunkFrames = CHUNKS,
) -> dict[str, float]:
    """Means of `score` over many videos, with `NAME_start` and `NAME_end` for the first and the last sixth.

    The key `videos` holds their number. Raises ValueError without videos, or unless there is one target for each
    video.
    """
    rows = []
    for video, target in zip(videos, targets, strict=True):
        track = measure(video)
        part = max(len(track) // DRIFT_FRACTION, 2)
        row = _score(track, target, chunks)
        for name, frames in (("start", slice(0, part)), ("end", slice(len(track) - part, None))):
            row |= {f"{key}_{name}": value for key, value in _frame_scores(track[frames], target).items()}
        rows.append(row)
    if not rows:
        raise ValueError("there is no video to score")
    names = [name for name in rows[0] if all(name in row for row in rows)]
    return {name: float(np.mean([row[name] for row in rows])) for name in names} | {"videos": float(len(rows))}


def rollout(
    video: UInt8[np.ndarray, "t h w 3"], target: toy.Attributes, fps: int, chunks: ChunkFrames = CHUNKS
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Scores of a long video for its drift, and some of them for each of its seconds of `fps` frames.

    Beside those of `score`: `NAME_end` of the last sixth, `NAME_drift` the change since the first sixth, `stuck` the
    share of the time in which the shape moves less than a quarter of its speed, `repeated` the share of the chunks that
    show the motion of a chunk shortly before, and `border_ratio`.
    """
    track = measure(video)
    part = max(len(track) // DRIFT_FRACTION, 2)
    first, last = (_moving_scores(track[frames], target) for frames in (slice(0, part), slice(-part, None)))
    values = _score(track, target, chunks) | {"stuck": _stuck(track, target)}
    values |= {"repeated": repeated(track.position, chunks), "border_ratio": border_ratio(video, chunks)}
    values |= {f"{name}_end": last[name] for name in SECONDS}
    values |= {f"{name}_drift": abs(last[name] - first[name]) for name in SECONDS}
    each = [_moving_scores(track[i : i + fps], target) for i in range(0, len(track) - fps + 1, fps)]
    return values, {name: [one[name] for one in each] for name in SECONDS}


def repeated(position: Float[np.ndarray, "t 2"], chunks: ChunkFrames = CHUNKS) -> float:
    """Share of the chunks, but the first, in which the shape moves on the path of one of the two chunks before.

    Frame by frame it is then within a pixel of where it was, on average. A shape that hardly moves repeats nothing: it
    is stuck.
    """
    ends = [chunks.before(number + 1) for number in range(chunks.chunks(len(position)))]
    paths = [position[end - chunks.later : end] for end in ends if end <= len(position)]
    found = []
    for number, path in enumerate(paths[1:], 1):
        apart = [np.linalg.norm(path - past, axis=1).mean() for past in paths[max(number - REPEATS, 0) : number]]
        moves = np.linalg.norm(path - path.mean(0), axis=1).mean() > REPEAT_DISTANCE
        found.append(moves and min(apart) < REPEAT_DISTANCE)
    return float(np.mean(found)) if found else 0.0


def border_ratio(video: UInt8[np.ndarray, "t h w 3"], chunks: ChunkFrames = CHUNKS) -> float:
    """Mean absolute change of pixels between chunks, relative to that between other frames; 1 for a single chunk."""
    change = np.abs(np.diff(video.astype(np.float32), axis=0)).mean((1, 2, 3))
    border = np.zeros(len(change), bool)
    border[chunks.borders] = True
    return float(change[border].mean() / max(change[~border].mean(), 1e-6)) if border.any() else 1.0


def latent_border_ratio(latents: Float[np.ndarray, "chunks t h w c"]) -> float:
    """Mean absolute change of latents from one chunk to the next, relative to that in the first step within chunks.

    Both steps are from or to a chunk's first latent frame, which stands for one frame where others stand for four, so
    that a rendered video encoded chunk by chunk has about 1; 1 for a single chunk, too.
    """
    if len(latents) == 1:
        return 1.0
    between, within = np.abs(latents[1:, 0] - latents[:-1, -1]).mean(), np.abs(latents[:, 1] - latents[:, 0]).mean()
    return float(between / max(within, 1e-6))


def _moving_scores(track: Track, target: toy.Attributes) -> dict[str, float]:
    return _frame_scores(track, target) | {"stuck": _stuck(track, target)}


def _stuck(track: Track, target: toy.Attributes) -> float:
    speeds = np.linalg.norm(_movement(track), axis=1)
    return float((speeds < toy.SPEEDS[target.speed] / 4).mean())


def _score(track: Track, target: toy.Attributes, chunks: ChunkFrames) -> dict[str, float]:
    part = max(len(track) // DRIFT_FRACTION, 2)
    values = _frame_scores(track, target)
    values["direction"] = float(_moves(track[:FIRST_FRAMES], target.direction))
    shift = track[-part:].foreground.mean(0) - track[:part].foreground.mean(0)
    values["colour_shift"] = _rms(shift)
    excess = _excess(track, target)
    if len(track) > chunks.first:
        values["chunk_jump"] = float(excess[chunks.borders].mean())
        starts = [excess[i : i + START_STEPS] for i in range(len(excess))[chunks.borders]]
        values["start_jump"] = float(np.concatenate(starts).mean())
    if isinstance(target, toy.Scene):
        path = toy.positions(target, len(track)) * toy.NOMINAL_SIZE / min(target.height, target.width)
        values["position_error"] = float(np.linalg.norm(track.position - path, axis=1).mean())
    return values


def _frame_scores(track: Track, target: toy.Attributes) -> dict[str, float]:
    """Metrics that are defined for any part of a video."""
    index = list(toy.SHAPES).index(target.shape)
    right = (track.correlation.argmax(1) == index) & (track.correlation[:, index] > RECOGNISED)
    colours = [_hue(rgb) for rgb in track.foreground]
    wanted = np.array([_wanted_colour(hue, target) for hue in colours])
    contrast = np.linalg.norm(track.foreground - track.background, axis=1)
    named = [hue is not None and toy.colour_name(hue) == target.colour for hue in colours] & (contrast > COLOURED)
    names = list(toy.BACKGROUNDS)
    backgrounds = np.array([toy.BACKGROUNDS[name] for name in names]) / 255
    offsets = track.background[:, None] - backgrounds
    errors = np.sqrt((offsets**2).mean(-1) + track.unevenness[:, None] ** 2)
    chosen = names.index(target.background)
    speed, true_speed = _speed(track), toy.SPEEDS[target.speed]
    return {
        "shape": float(right.mean()),
        "shape_correlation": float(track.correlation[:, index].mean()),
        "colour": float(np.mean(named)),
        "colour_error": float(np.sqrt(((track.foreground - wanted) ** 2).mean(1)).mean()),
        "background": float(((errors.argmin(1) == chosen) & (errors[:, chosen] < BACKGROUND_TOLERANCE)).mean()),
        "background_error": float(errors[:, chosen].mean()),
        "contrast": float((contrast / np.linalg.norm(wanted - backgrounds[chosen], axis=1)).mean()),
        # By ratio, so that half and twice the speed are equally wrong.
        "speed": float(speed > 0 and abs(math.log(speed / true_speed)) < SPEED_TOLERANCE),
        "speed_error": abs(speed - true_speed),
        "jump": float(_excess(track, target).mean()),
    }


def _match(distance: Float[np.ndarray, "t h w"]) -> tuple[Float[np.ndarray, "t s"], Float[np.ndarray, "t s 2"]]:
    """Greatest correlation of each frame with each shape over all positions in the box, and its position (y, x)."""
    height, width = distance.shape[1:]
    frames = distance - distance.mean((1, 2), keepdims=True)
    norms = np.linalg.norm(frames, axis=(1, 2))
    spectrum = np.fft.rfft2(frames)
    best, places = [], []
    for shape in toy.SHAPES:
        origin = np.array([height // 2, width // 2])
        template = toy.coverage(shape, origin[None].astype(float), height, width)[0]
        template = np.roll(template - template.mean(), -origin, (0, 1))
        product = np.fft.irfft2(spectrum * np.fft.rfft2(template).conj(), (height, width))
        # The transform wraps around: only centres count at which the shape is in the box, within a pixel.
        half = toy.extent(shape, height, width) / 2
        y, x = (np.arange(n) for n in (height, width))
        inside = (np.abs(y - height / 2) <= height / 2 - half[0] + 1)[:, None] & (
            np.abs(x - width / 2) <= width / 2 - half[1] + 1
        )
        flat = np.where(inside, product, -np.inf).reshape(len(frames), -1)
        place = flat.argmax(1)
        best.append(flat[np.arange(len(frames)), place] / np.maximum(norms * np.linalg.norm(template), 1e-6))
        places.append(np.stack(np.unravel_index(place, (height, width)), -1).astype(float))
    return np.stack(best, 1), np.stack(places, 1)


def _around(centre: np.ndarray, half: np.ndarray, height: int, width: int) -> np.ndarray:
    """Mask [t, h, w] of the pixels whose centres are within `half` (y, x) of `centre` (y, x)."""
    rows = np.abs(np.arange(height) + 0.5 - centre[:, :1]) <= half[:, :1]
    columns = np.abs(np.arange(width) + 0.5 - centre[:, 1:]) <= half[:, 1:]
    return rows[:, :, None] & columns[:, None, :]


def _mean(pixels: Float[np.ndarray, "t h w 3"], mask: Float[np.ndarray, "t h w"]) -> Float[np.ndarray, "t 3"]:
    return np.einsum("thwc,thw->tc", pixels, mask) / np.maximum(mask.sum((1, 2)), 1)[:, None]


def _hue(rgb: Float[np.ndarray, "3"]) -> float | None:
    """Hue in degrees, or None for a colour that is too grey."""
    return 360 * colorsys.rgb_to_hsv(*rgb.tolist())[0] if np.ptp(rgb) > COLOURED else None


def _wanted_colour(hue: float | None, target: toy.Attributes) -> Float[np.ndarray, "3"]:
    """The scene's colour, 0 to 1. For a caption: the colour nearest to `hue` in the band of its colour name."""
    if isinstance(target, toy.Scene):
        return target.foreground / 255
    low, high = toy.COLOURS[target.colour]
    middle, half = (low + high) / 2, (high - low) / 2
    offset = 0.0 if hue is None else (hue - middle + 180) % 360 - 180
    return toy.hue_to_rgb(middle + min(max(offset, -half), half)) / 255


def _moves(track: Track, direction: str) -> bool:
    """True if the movement is within 22.5 degrees of a direction and at least a quarter of the slowest speed."""
    velocity = np.median(_movement(track), axis=0)
    speed = float(np.linalg.norm(velocity))
    if speed < min(toy.SPEEDS.values()) / 4:
        return False
    return max(float(velocity @ np.array(unit)) / speed for unit in toy.DIRECTIONS[direction]) > math.cos(math.pi / 8)


def _speed(track: Track) -> float:
    """Median speed in pixels per frame; the few spans with a bounce do not change it."""
    return float(np.median(np.linalg.norm(_movement(track), axis=1)))


def _movement(track: Track) -> Float[np.ndarray, "spans 2"]:
    """Velocity (y, x) over each span of SPAN frames."""
    span = min(SPAN, len(track) - 1)
    return (track.position[span:] - track.position[:-span]) / span


def _excess(track: Track, target: toy.Attributes) -> Float[np.ndarray, " t-1"]:
    """Excess of each step over the target's speed."""
    steps = np.linalg.norm(np.diff(track.position, axis=0), axis=1)
    return np.maximum(steps - toy.SPEEDS[target.speed], 0)


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))
