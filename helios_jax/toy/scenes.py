"""The larger world: one or two shapes over a textured background that a camera pans across, at 128 x 128 pixels.

The shapes are those of `toy.world`, smaller. Each bounces in the frame; where two meet, the second is in front. The
background is grey, so that shapes are told from it by their colour, and a pan moves it through the frame. A caption
names everything that can be judged, as in "a red square moves right fast and a blue plus moves up slowly on a dark
striped background that pans left". About a tenth of the words of a shape (colour, shape, direction and speed together)
is held out. Everything follows from a seed.
"""

import itertools
import re
import zlib
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Float, UInt8

from helios_jax.toy import world
from helios_jax.toy.world import Attributes, Split

CHUNK_FRAMES = world.CHUNK_FRAMES
NOMINAL_SIZE = 128
SIZE = 0.72  # of the shapes, relative to those of the smaller world
# Mean brightness of the background, 0 to 255; a texture takes it up and down by CONTRAST.
BRIGHTNESS = {"dark": 45.0, "grey": 115.0}
CONTRAST = 28.0
PERIOD = 32.0  # length of a texture's wave, in pixels of a 128 x 128 frame
# Waves (y, x), in periods across a PERIOD, whose product is the texture.
TEXTURES: dict[str, tuple[tuple[int, int], ...]] = {
    "plain": (),
    "striped": ((0, 1),),
    "barred": ((1, 0),),
    "checkered": ((1, 0), (0, 1)),
}
# Movement of the background (y, x) in pixels per frame of a 128 x 128 frame, by its direction.
PANS: dict[str, tuple[float, float]] = {"left": (0, -1.0), "right": (0, 1.0), "up": (-1.0, 0), "down": (1.0, 0)}
TWO = 0.5  # share of scenes with two shapes


@dataclass(frozen=True)
class Background:
    """The words of a background; `pan` None: it stands still, as a plain one does."""

    brightness: str
    texture: str
    pan: str | None = None

    def __str__(self) -> str:
        moves = "" if self.pan is None else f" that pans {self.pan}"
        return f"a {self.brightness} {self.texture} background{moves}"


@dataclass(frozen=True)
class Scene:
    """One video's ground truth: its shapes, from back to front, its background, and the phase (y, x) of the texture."""

    shapes: tuple[world.Scene, ...]
    background: Background
    phase: tuple[float, float]
    height: int = NOMINAL_SIZE
    width: int = NOMINAL_SIZE


@cache
def backgrounds() -> tuple[Background, ...]:
    """All backgrounds: striped ones pan only sideways and barred ones up or down, as other pans cannot be seen."""
    seen = {"plain": (None,), "striped": (None, "left", "right"), "barred": (None, "up", "down")}
    return tuple(
        Background(brightness, texture, pan)
        for brightness, texture in itertools.product(BRIGHTNESS, TEXTURES)
        for pan in seen.get(texture, (None, *PANS))
    )


@cache
def movers(split: Split) -> tuple[Attributes, ...]:
    """All combinations of the words of a shape in a split."""
    names = itertools.product(world.COLOURS, world.SHAPES, world.DIRECTIONS, world.SPEEDS)
    every = (Attributes(*words, background="grey") for words in names)
    return tuple(one for one in every if (zlib.crc32(_mover(one).encode()) % 10 == 0) == (split == "test"))


def sample_scene(seed: int, split: Split, height: int = NOMINAL_SIZE, width: int = NOMINAL_SIZE) -> Scene:
    """The scene of a `seed` >= 0; two shapes never have the same colour."""
    rng = np.random.default_rng([seed, split == "test", 2])
    first, second = (movers(split)[i] for i in rng.integers(len(movers(split)), size=2))
    while second.colour == first.colour:
        second = movers(split)[rng.integers(len(movers(split)))]
    words = (first, second) if rng.uniform() < TWO else (first,)
    shapes = tuple(world.place(one, rng, height, width, SIZE) for one in words)
    behind = backgrounds()[rng.integers(len(backgrounds()))]
    y, x = rng.uniform(0, PERIOD, size=2)
    return Scene(shapes, behind, (float(y), float(x)), height, width)


def caption(scene: Scene) -> str:
    """The sentence of a scene."""
    return f"{' and '.join(map(_mover, scene.shapes))} on {scene.background}"


def _mover(one: Attributes) -> str:
    return f"a {one.colour} {one.shape} moves {one.direction} {one.speed}"


MOVER = re.compile(
    rf"a ({'|'.join(world.COLOURS)}) ({'|'.join(world.SHAPES)}) moves ({'|'.join(world.DIRECTIONS)})"
    rf" ({'|'.join(world.SPEEDS)})"
)
BEHIND = re.compile(rf"a ({'|'.join(BRIGHTNESS)}) ({'|'.join(TEXTURES)}) background(?: that pans ({'|'.join(PANS)}))?")


def parse_caption(text: str) -> tuple[tuple[Attributes, ...], Background]:
    """The words of the shapes and of the background. Raises ValueError for a text that is no caption of this world."""
    shapes, _, behind = text.partition(" on ")
    found = [MOVER.fullmatch(part) for part in shapes.split(" and ")]
    ground = BEHIND.fullmatch(behind)
    if ground is None or not all(found) or len(found) > 2:
        raise ValueError(
            f"not a caption of the larger toy world: {text!r}; one is {caption(sample_scene(0, 'train'))!r}"
        )
    return tuple(Attributes(*one.groups(), background="grey") for one in found if one), Background(*ground.groups())


def render(scene: Scene, num_frames: int) -> UInt8[np.ndarray, "t h w 3"]:
    """The first `num_frames` frames of a scene."""
    ground = texture(scene, num_frames)
    frames = np.repeat(ground[..., None], 3, -1)
    for shape in scene.shapes:
        cover = world.coverage(shape.shape, world.positions(shape, num_frames), shape.height, shape.width, shape.size)
        for channel, value in enumerate(shape.foreground.tolist()):
            frames[..., channel] += cover * (value - frames[..., channel])
    return (frames + 0.5).astype(np.uint8)


def texture(scene: Scene, num_frames: int) -> Float[np.ndarray, "t h w"]:
    """Brightness of the background, 0 to 255."""
    words, scale = scene.background, min(scene.height, scene.width) / NOMINAL_SIZE
    moved = np.arange(num_frames)[:, None] * np.array(PANS[words.pan] if words.pan else (0.0, 0.0))
    wave = np.ones((num_frames, scene.height, scene.width), np.float32)
    for y, x in TEXTURES[words.texture]:
        at = _along(scene.height, scale, moved[:, 0] + scene.phase[0]) if y else None
        at_x = _along(scene.width, scale, moved[:, 1] + scene.phase[1]) if x else None
        wave = wave * (at[:, :, None] if at is not None else 1) * (at_x[:, None, :] if at_x is not None else 1)
    return BRIGHTNESS[words.brightness] + (CONTRAST * wave if TEXTURES[words.texture] else 0 * wave)


def _along(pixels: int, scale: float, shift: Float[np.ndarray, " t"]) -> Float[np.ndarray, "t n"]:
    """A wave of PERIOD along an axis, shifted in each frame; its values are those at the pixels' centres."""
    at = (np.arange(pixels) + 0.5) / scale
    return np.sin(2 * np.pi * (at - shift[:, None]) / PERIOD).astype(np.float32)
