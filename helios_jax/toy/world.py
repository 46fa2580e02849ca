"""A procedural, captioned video world with exact ground truth, small enough to train on two cores.

One coloured shape bounces in a box on a plain background. The caption names everything that can be judged (colour,
shape, direction of the first movement, speed, background); the hue inside a colour's band is free, so that a drift of
colour is visible. About a tenth of the combinations of caption words is held out from training. Every scene follows
from a seed, and a frame is rendered exactly: the coverage of a pixel by an axis-aligned rectangle is a product of two
overlaps, which is what supersampling converges to.

Lengths are pixels of a 64x64 frame and scale with the frame's shorter side; points are (y, x), pixel centres at .5.
"""

import colorsys
import itertools
import zlib
from dataclasses import dataclass, fields
from functools import cache
from typing import Literal

import numpy as np
from jaxtyping import Float, UInt8

Split = Literal["train", "test"]

CHUNK_FRAMES = 33
NOMINAL_SIZE = 64

# A shape is a union of at most two centred rectangles, (height, width) each.
SHAPES: dict[str, tuple[tuple[float, float], ...]] = {
    "square": ((18, 18),),
    "plus": ((24, 8), (8, 24)),
    "horizontal bar": ((10, 26),),
    "vertical bar": ((26, 10),),
}
# Hue bands in degrees; the gaps between them keep two names from meaning the same picture.
COLOURS: dict[str, tuple[float, float]] = {
    "red": (-8, 8),
    "orange": (25, 35),
    "yellow": (52, 62),
    "green": (105, 135),
    "cyan": (172, 188),
    "blue": (212, 232),
    "purple": (264, 280),
    "pink": (312, 330),
}
SATURATION, VALUE = 0.8, 1.0
# Unit vectors (y, x); "diagonally" takes any of the four diagonals.
DIRECTIONS: dict[str, tuple[tuple[float, float], ...]] = {
    "right": ((0, 1),),
    "left": ((0, -1),),
    "up": ((-1, 0),),
    "down": ((1, 0),),
    "diagonally": tuple((y * 0.5**0.5, x * 0.5**0.5) for y in (-1, 1) for x in (-1, 1)),
}
SPEEDS: dict[str, float] = {"slowly": 0.6, "fast": 1.5}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {"black": (0, 0, 0), "grey": (110, 110, 110), "navy": (0, 0, 90)}
# A shape starts in this part of its path, so that it visibly moves in the caption's direction before it bounces.
START_FRACTION = 0.35


@dataclass(frozen=True)
class Attributes:
    """The words of a caption, each a key of the table of its name above."""

    colour: str
    shape: str
    direction: str
    speed: str
    background: str

    def __post_init__(self):
        for field in fields(Attributes):
            value, known = getattr(self, field.name), _TABLES[field.name]
            if value not in known:
                raise ValueError(f"unknown {field.name} {value!r}: choose one of {', '.join(known)}")


_TABLES = {
    "colour": COLOURS,
    "shape": SHAPES,
    "direction": DIRECTIONS,
    "speed": SPEEDS,
    "background": BACKGROUNDS,
}


@dataclass(frozen=True)
class Scene(Attributes):
    """One video's ground truth: the words of its caption and the values behind them.

    `hue` is in degrees, `start` the centre (y, x) in frame 0, `velocity` the first movement in pixels per frame. `size`
    is a factor of the shape's, 1 in a world of one shape.
    """

    hue: float
    start: tuple[float, float]
    velocity: tuple[float, float]
    height: int = NOMINAL_SIZE
    width: int = NOMINAL_SIZE
    size: float = 1.0

    @property
    def foreground(self) -> Float[np.ndarray, "3"]:
        """RGB of the shape, 0 to 255."""
        return hue_to_rgb(self.hue)


def hue_to_rgb(hue: float) -> Float[np.ndarray, "3"]:
    """RGB, 0 to 255, of a hue in degrees at the world's saturation and value."""
    return 255 * np.array(colorsys.hsv_to_rgb(hue % 360 / 360, SATURATION, VALUE))


def hue_distance(hue: float, colour: str) -> float:
    """Degrees from `hue` to the band of `colour`; 0 inside it."""
    low, high = COLOURS[colour]
    middle, half = (low + high) / 2, (high - low) / 2
    return max(0.0, abs((hue - middle + 180) % 360 - 180) - half)


def colour_name(hue: float) -> str:
    """The colour whose band is nearest to `hue` (degrees)."""
    return min(COLOURS, key=lambda colour: hue_distance(hue, colour))


@cache
def combinations(split: Split) -> tuple[Attributes, ...]:
    """The caption word combinations of a split: about a tenth is "test", and every word occurs in both splits."""
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}: choose 'train' or 'test'")
    every = (Attributes(*words) for words in itertools.product(*_TABLES.values()))
    return tuple(a for a in every if _held_out(a) == (split == "test"))


def _held_out(attributes: Attributes) -> bool:
    # A checksum, not a random generator: the split must not change with a library version.
    return zlib.crc32(caption(attributes).encode()) % 10 == 0


def sample_scene(seed: int, split: Split, height: int = NOMINAL_SIZE, width: int = NOMINAL_SIZE) -> Scene:
    """The scene of a `seed` >= 0 (the same seed gives different scenes in the two splits)."""
    rng = np.random.default_rng([seed, split == "test"])
    choices = combinations(split)
    return place(choices[rng.integers(len(choices))], rng, height, width)


def place(a: Attributes, rng: np.random.Generator, height: int, width: int, size: float = 1.0) -> Scene:
    """Draws the position and the hue of a scene with the words `a`."""
    unit = np.array(DIRECTIONS[a.direction][rng.integers(len(DIRECTIONS[a.direction]))])
    fraction = rng.uniform(size=2)
    fraction = np.where(unit > 0, fraction * START_FRACTION, fraction)
    fraction = np.where(unit < 0, 1 - fraction * START_FRACTION, fraction)
    low, high = _limits(a.shape, height, width, size)
    velocity = unit * SPEEDS[a.speed] * _scale(height, width)
    return Scene(
        **{field.name: getattr(a, field.name) for field in fields(Attributes)},
        hue=float(rng.uniform(*COLOURS[a.colour]) % 360),
        start=tuple((low + fraction * (high - low)).tolist()),
        velocity=tuple(velocity.tolist()),
        height=height,
        width=width,
        size=size,
    )


def caption(scene: Attributes) -> str:
    """The sentence of a scene, e.g. "a red plus moves left fast on a navy background"."""
    return f"a {scene.colour} {scene.shape} moves {scene.direction} {scene.speed} on a {scene.background} background"


def parse_caption(text: str) -> Attributes:
    """The words of a caption of this world. Raises ValueError for any other text."""
    for split in ("train", "test"):
        for attributes in combinations(split):
            if caption(attributes) == text:
                return attributes
    raise ValueError(f"not a caption of the toy world: {text!r}; one is {caption(combinations('train')[0])!r}")


def positions(scene: Scene, num_frames: int) -> Float[np.ndarray, "t 2"]:
    """The shape's centre (y, x) in each frame: straight lines, mirrored at the walls."""
    low, high = _limits(scene.shape, scene.height, scene.width, scene.size)
    span = high - low
    way = np.asarray(scene.start) - low + np.arange(num_frames)[:, None] * np.asarray(scene.velocity)
    # A triangle wave of period 2*span is a point bouncing between 0 and span.
    return low + span - np.abs(way % (2 * span) - span)


def render(scene: Scene, num_frames: int) -> UInt8[np.ndarray, "t h w 3"]:
    """The first `num_frames` frames of a scene."""
    cover = coverage(scene.shape, positions(scene, num_frames), scene.height, scene.width, scene.size)
    frames = np.empty((*cover.shape, 3), np.uint8)
    # Channel by channel: broadcasting over a last dimension of 3 is seven times slower.
    for channel, (back, fore) in enumerate(zip(BACKGROUNDS[scene.background], scene.foreground.tolist())):
        frames[..., channel] = back + cover * (fore - back) + 0.5
    return frames


def coverage(
    shape: str,
    centres: Float[np.ndarray, "t 2"],
    height: int = NOMINAL_SIZE,
    width: int = NOMINAL_SIZE,
    size: float = 1.0,
) -> Float[np.ndarray, "t h w"]:
    """Fraction of each pixel, 0 to 1, that a shape at `centres` (y, x) covers."""
    scale = _scale(height, width) * size

    def rectangle(size: tuple[float, float]) -> np.ndarray:
        rows = _overlap(centres[:, 0], size[0] * scale, height)
        return rows[:, :, None] * _overlap(centres[:, 1], size[1] * scale, width)[:, None, :]

    first, *rest = SHAPES[shape]
    cover = rectangle(first)
    for second in rest:
        both = (min(first[0], second[0]), min(first[1], second[1]))
        cover = cover + rectangle(second) - rectangle(both)
    return cover


def extent(
    shape: str, height: int = NOMINAL_SIZE, width: int = NOMINAL_SIZE, size: float = 1.0
) -> Float[np.ndarray, "2"]:
    """(height, width) in pixels of the box around a shape."""
    return np.max(SHAPES[shape], axis=0) * _scale(height, width) * size


def _overlap(centre: np.ndarray, size: float, pixels: int) -> Float[np.ndarray, "t pixels"]:
    """Length of each pixel [i, i + 1] inside [centre - size / 2, centre + size / 2]."""
    edges = np.arange(pixels + 1)
    inside = np.clip(edges - (centre - size / 2)[:, None], 0, size)
    return np.diff(inside, axis=1).astype(np.float32)


def _limits(shape: str, height: int, width: int, size: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """The least and greatest centre (y, x) at which a shape is inside the frame."""
    half = extent(shape, height, width, size) / 2
    return half, np.array([height, width]) - half


def _scale(height: int, width: int) -> float:
    return min(height, width) / NOMINAL_SIZE
