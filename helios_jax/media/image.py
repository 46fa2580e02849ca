"""Image files and images at another size."""

import os
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import ExifTags, Image, UnidentifiedImageError

from helios_jax.messages import one_line
from helios_jax.path_checks import check_readable

# Pillow's exceptions for damaged files whose header is valid.
DAMAGED = (OSError, RuntimeError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF orientation


def read_image(path: str | os.PathLike) -> UInt8[np.ndarray, "h w 3"]:
    """The RGB picture in a file (the first of several), upright, without alpha, as diffusers' `load_image`.

    Raises FileNotFoundError for a missing file and ValueError, in one line, for a file that is damaged or not an image.
    """
    path = Path(path)
    check_readable(path, "an image file, such as photo.png")
    try:
        with Image.open(path) as image:
            image.load()
            upright = _upright(image)
    except UnidentifiedImageError:
        raise ValueError(f"{path}: is not a readable image; name a PNG or JPEG file") from None
    except DAMAGED as error:
        raise ValueError(f"{path}: does not decode ({one_line(error)}); copy or save the image again") from None
    return np.asarray(to_rgb(upright, str(path)))


def _upright(image: Image.Image) -> Image.Image:
    """The image turned by its EXIF orientation.

    By hand: Pillow's `exif_transpose` also writes the other tags anew, which fails if one of them is broken.
    """
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # broken EXIF data raises anything; the picture itself is whole
        return image
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image, name: str = "image") -> Image.Image:
    """8-bit RGB without alpha. 16-bit grey is scaled; Pillow alone would make it white.

    Raises ValueError, in one line that begins with `name`, for pixels without a known range.
    """
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"{name}: its pixels are 32-bit numbers without a known range; save it with 8 or 16 bits")
    return image.convert("RGB")


def resize(
    image: UInt8[np.ndarray, "h w 3"] | Float[np.ndarray, "h w 3"], height: int, width: int
) -> Float[np.ndarray, "height width 3"]:
    """Resizes with Lanczos to a size, ignoring proportions, as diffusers does with PIL images; values in [0, 1].

    uint8 pixels are resized as Pillow does, with integers. Floats in [0, 1] are resized in float32.
    """
    size, how = (width, height), Image.Resampling.LANCZOS
    if image.dtype == np.uint8:
        return np.asarray(Image.fromarray(image).resize(size, how), np.float32) / np.float32(255)
    channels = [Image.fromarray(np.ascontiguousarray(image[..., i], np.float32)).resize(size, how) for i in range(3)]
    return np.stack([np.asarray(channel) for channel in channels], -1).clip(0, 1)
