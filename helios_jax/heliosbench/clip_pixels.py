"""Pictures as CLIP's encoders take them: the shorter side at 224 pixels, the middle cut out, normalized.

The resizing is torchvision's bicubic one without antialiasing, as upstream asks for.
"""

import functools

import numpy as np
from jaxtyping import Float, UInt8

SIDE = 224
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
SHARPNESS = -0.75  # of torch's cubic kernel, where it is called a


def clip_pixels(rgb: UInt8[np.ndarray, "h w 3"], rounded: bool, side: int = SIDE) -> Float[np.ndarray, "side side 3"]:
    """The normalized middle of a picture.

    With `rounded`, pixels are rounded and clipped to 0 to 255 after resizing, as in a uint8 tensor (semantics). Else
    the overshoot of the cubic kernel stays, as in a float tensor (aesthetic score).
    """
    height, width = rgb.shape[:2]
    short = min(height, width)
    rows = _cubic(height, side if height == short else int(side * height / width), side)
    columns = _cubic(width, side if width == short else int(side * width / height), side)
    pixels = np.einsum("ah,hwc->awc", rows, rgb.astype(np.float32), optimize=True)
    pixels = np.einsum("bw,awc->abc", columns, pixels, optimize=True)
    if rounded:
        pixels = pixels.round().clip(0, 255)
    return (pixels / np.float32(255) - MEAN) / STD


@functools.lru_cache(maxsize=16)
def _cubic(size: int, resized: int, cut: int) -> Float[np.ndarray, "cut size"]:
    """The matrix that resizes one side from `size` to `resized` pixels, with only its middle `cut` rows."""
    first = round((resized - cut) / 2)
    places = (np.arange(first, first + cut) + 0.5) * (size / resized) - 0.5
    base = np.floor(places).astype(int)
    matrix = np.zeros((cut, size))
    for tap in range(-1, 3):
        weight = _kernel(np.abs(places - base - tap))
        np.add.at(matrix, (np.arange(cut), (base + tap).clip(0, size - 1)), weight)
    return matrix.astype(np.float32)


def _kernel(distance: np.ndarray) -> np.ndarray:
    a, x = SHARPNESS, distance
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
