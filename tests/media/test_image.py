"""Image files: upright RGB as diffusers loads them, and a damaged file is refused in one line."""

import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from helios_jax.media.image import read_image, resize, to_rgb

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (24, 40, 3), np.uint8)


def save(path, pixels=PIXELS, **options):
    Image.fromarray(pixels).save(path, **options)
    return path


def test_png_round_trips(tmp_path):
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.png")), PIXELS)


@pytest.mark.parametrize(
    ("orientation", "seen"),
    [
        (1, PIXELS),
        (2, PIXELS[:, ::-1]),
        (3, PIXELS[::-1, ::-1]),
        (4, PIXELS[::-1]),
        (5, PIXELS.swapaxes(0, 1)),
        (6, np.rot90(PIXELS, -1)),
        (7, PIXELS[::-1, ::-1].swapaxes(0, 1)),
        (8, np.rot90(PIXELS)),
    ],
)
def test_image_is_upright(tmp_path, orientation, seen):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.png", exif=exif)), seen)


def test_every_mode_becomes_rgb(tmp_path):
    alpha = np.concatenate([PIXELS, np.zeros((24, 40, 1), np.uint8)], 2)
    np.testing.assert_array_equal(read_image(save(tmp_path / "alpha.png", alpha)), PIXELS)  # dropped, not composited
    grey = PIXELS[..., 0]
    np.testing.assert_array_equal(read_image(save(tmp_path / "grey.png", grey)), np.repeat(grey[..., None], 3, 2))
    deep = grey.astype(np.uint16) * 257
    np.testing.assert_array_equal(read_image(save(tmp_path / "deep.png", deep)), np.repeat(grey[..., None], 3, 2))
    Image.fromarray(PIXELS).quantize(256).save(tmp_path / "palette.gif")
    assert read_image(tmp_path / "palette.gif").shape == PIXELS.shape
    with pytest.raises(ValueError, match="photo: its pixels are 32-bit numbers without a known range"):
        to_rgb(Image.fromarray(grey.astype(np.float32)), "photo")


def test_file_without_image_is_refused_in_one_line(tmp_path):
    (tmp_path / "text.png").write_text("no image " * 99)
    (tmp_path / "empty.jpg").touch()
    for name in ("text.png", "empty.jpg"):
        with pytest.raises(ValueError, match=rf"{name}: is not a readable image; name a PNG or JPEG file"):
            read_image(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no such file; name an image file"):
        read_image(tmp_path / "nothing.png")
    os.mkfifo(tmp_path / "fifo.png")
    for path, message in {
        tmp_path: "is a folder; name an image file",
        tmp_path / "fifo.png": "not a regular file",
        Path("/dev/zero"): "not a regular file",
        tmp_path / ("a" * 300 + ".png"): "cannot be opened",
    }.items():
        with pytest.raises(ValueError, match=message):
            read_image(path)


def test_image_with_a_broken_exif_entry_is_read_upright(tmp_path):
    # Orientation 6, and a resolution (a rational) that is stored as text.
    entries = struct.pack("<HHHIHHHHIII", 2, 0x0112, 3, 1, 6, 0, 0x011A, 2, 1, 38, 0)
    save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0" + struct.pack("<I", 8) + entries + struct.pack("<II", 1, 0))
    assert read_image(tmp_path / "a.jpg").shape == (40, 24, 3)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif", "tiff", "bmp", "avif"])
def test_detected_damage_is_refused_in_one_line(tmp_path, kind):
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(PIXELS).save(buffer, kind, **({"exif": exif} if kind in ("png", "jpeg", "webp") else {}))
    data, lines = buffer.getvalue(), []
    path = tmp_path / f"a.{kind}"
    broken = [data[: len(data) // 2], data[:40]]
    for start in RNG.integers(0, len(data) - 8, 60):
        broken.append(data[:start] + RNG.bytes(8) + data[start + 8 :])
    for some in broken:
        path.write_bytes(some)
        try:
            assert read_image(path).dtype == np.uint8
        except ValueError as error:
            lines.append(str(error))
    assert lines
    assert all(line.startswith(f"{path}: ") and "\n" not in line for line in lines)


def test_floats_and_bytes_resize_equally():
    y, x = np.mgrid[:24, :40] / 40
    smooth = np.stack([x, y, (x + y) / 2], -1)
    for height, width in ((16, 16), (48, 64), (24, 40)):
        floats = resize(smooth.astype(np.float32), height, width)
        bytes_ = resize((255 * smooth).round().astype(np.uint8), height, width)
        assert floats.shape == bytes_.shape == (height, width, 3)
        assert floats.dtype == bytes_.dtype == np.float32
        np.testing.assert_allclose(floats, bytes_, atol=1.5 / 255)
    checks = (np.indices((24, 40)).sum(0) // 6 % 2)[..., None].repeat(3, 2).astype(np.float32)
    large = resize(checks, 50, 90)
    assert large.min() == 0  # Lanczos overshoots at edges; colours do not
    assert large.max() == 1
