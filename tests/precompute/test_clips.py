"""Clips as upstream's JSON lists them: the right frames, the right pixels, and one line for what cannot be."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helios_jax.media import video
from helios_jax.media.mp4 import VideoWriter
from helios_jax.media.video import frames_at, read_video
from helios_jax.precompute.clips import SIZES, Clip, Selection, fit, nearest_size, read_clip, read_lists

REAL = Path(__file__).resolve().parents[3] / "shared" / "heliosbench"


def entry(**change) -> dict:
    base = {
        "path": "videos/a.mp4", "cut": [0, 129], "crop": [0, 832, 0, 480], "fps": 24.0, "num_frames": 129,
        "resolution": {"height": 480, "width": 832}, "cap": ["a cat", "an animal"],
    }  # fmt: skip
    return {key: value for key, value in (base | change).items() if value is not ...}


def parse(folder: Path, *entries, **selection):
    path = folder / "list.json"
    path.write_text(json.dumps(entries))
    return read_lists([path], None, Selection(**selection))


def one(folder: Path, change: dict, **selection) -> Clip:
    (clip,), rejected = parse(folder, entry(**change), **selection)
    assert rejected == []
    return clip


def write(path: Path, numbers) -> Path:
    """A video of 32x64 pixels whose frames show their number: black and white blocks are its bits."""
    bits = (np.array(list(numbers))[:, None] >> np.arange(16)) & 1
    frames = np.kron(bits.reshape(-1, 2, 8), np.ones((16, 8))) * 255
    with VideoWriter(path, 24, 32, 64) as video:
        video.write(np.repeat(frames[..., None], 3, -1).astype(np.uint8))
    return path


def numbers(pixels: np.ndarray) -> list[int]:
    """What frames [..., 2 * i, 8 * j, 3] show."""
    frames = pixels.reshape(-1, *pixels.shape[-3:])
    h, w = frames.shape[1] // 2, frames.shape[2] // 8
    bits = frames.reshape(-1, 2, h, 8, w, 3).mean((2, 4, 5)).reshape(-1, 16) > 127
    return (bits @ (1 << np.arange(16))).tolist()


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """A file of 400 frames, and its folder."""
    return write(tmp_path_factory.mktemp("long") / "a.mp4", range(400)).parent


def test_an_entry_becomes_a_clip(tmp_path):
    clip = one(tmp_path, {})
    assert clip.caption == "a cat"
    assert clip.file == str(tmp_path / "videos/a.mp4")
    assert clip.id == "videos/a_0-129"
    assert (clip.first, clip.step, clip.chunks, clip.size, clip.bucket) == (0, 1.0, 3, (384, 640), "384x640")
    assert one(tmp_path, {"cut": ..., "crop": ...}).crop == (0, 832, 0, 480)
    assert one(tmp_path, {"cut": ..., "num_frames": 165}).chunks == 5
    assert one(tmp_path, {"cap": "a dog"}).caption == "a dog"
    assert one(tmp_path, {"short": "cat"}, caption_key="short").caption == "cat"
    assert one(tmp_path, {"cut": [0, 81]}, min_frames=33).chunks == 2
    assert one(tmp_path, {}, max_frames=33).chunks == 1
    assert one(tmp_path, {"fps": 48}, fps=24, min_frames=33).chunks == 1  # 65 frames
    assert one(tmp_path, {"fps": 48, "cut": [0, 131]}, fps=24, min_frames=33).chunks == 2  # 66
    assert one(tmp_path, {"fps": 23.976}, fps=24).step == 1.0


@pytest.mark.parametrize(
    ("change", "selection", "message"),
    [
        ({"path": ...}, {}, "has no path"),
        ({"cap": []}, {}, "has no caption 'cap'"),
        ({"cap": [" "]}, {}, "has no caption"),
        ({"cap": "\ud83d"}, {}, "cap must be UTF-8"),
        ({}, {"caption_key": "short"}, "has no caption 'short'"),
        ({"cut": [5, 5]}, {}, r"cut \[5, 5\] .* holds no frame"),
        ({"cut": [-1, 200]}, {}, "holds no frame"),
        ({"cut": [0, 1, 2]}, {}, r"cut must be 2 whole numbers, got \[0, 1, 2\]"),
        ({"cut": [0, 0.5]}, {}, "whole numbers"),
        ({"cut": ..., "num_frames": ...}, {}, "num_frames must be a whole number, got null"),
        ({"crop": [10, 10, 0, 480]}, {}, "holds no pixel"),
        ({"crop": "all"}, {}, 'crop must be 4 whole numbers, got "all"'),
        ({"crop": ..., "resolution": ...}, {}, "width must be a whole number"),
        ({"cut": [0, 81]}, {}, "81 frames are fewer than --min-frames 121"),
        ({"crop": [0, 480, 0, 832]}, {}, r"832 x 480 pixels .* of the shape 640x384, no --size"),
        ({"fps": 12}, {"fps": 24}, "12 frames a second are fewer than --fps 24"),
        ({"fps": ...}, {"fps": 24}, "its fps is None"),
    ],
)
def test_unusable_entry_is_refused_with_its_reason(tmp_path, change, selection, message):
    good = entry(path="good.mp4", short=["s"])
    clips, refused = parse(tmp_path, good, entry(**change), good, **selection)
    (bad,) = refused
    assert [clip.id for clip in clips] == ["good_0-129"] * 2
    assert "list.json[1]" in bad.reason + bad.id
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(bad.reason)


def test_file_that_is_not_a_list_gives_a_one_line_error(tmp_path):
    for text, message in (("{}", "must be a JSON list of clips, not dict"), ("[", "is not a JSON list")):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ValueError, match=message) as error:
            read_lists([tmp_path / "a.json"], None, Selection())
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_lists([tmp_path / "b.json"], None, Selection())
    clips, rejected = parse(tmp_path, 7, entry())
    assert (len(clips), rejected[0].id) == (1, "list.json[0]")
    for wrong in ({"sizes": ()}, {"fps": 0}, {"min_frames": 32}, {"max_frames": 5}):
        with pytest.raises(ValueError, match="--"):
            Selection(**wrong)


def test_sizes_equal_upstream():
    # Computed with find_nearest_resolution_bucket of dataloader_mp4_dist.py.
    for shape, size in {
        (480, 832): (384, 640), (832, 480): (640, 384), (512, 512): (512, 512), (720, 1280): (384, 640),
        (1080, 1080): (512, 512), (240, 320): (448, 576), (1280, 720): (640, 384), (300, 900): (320, 768),
    }.items():  # fmt: skip
        assert nearest_size(*shape) == size
    assert nearest_size(10, 20, ((4, 8), (8, 16), (4, 4))) == (8, 16)  # the last of equals
    assert all(nearest_size(*size) == size for size in SIZES)


def test_clips_of_several_shapes_get_their_sizes(tmp_path):
    tall = entry(crop=[0, 480, 0, 832])
    clips, rejected = parse(tmp_path, entry(), tall, sizes=((640, 384), (384, 640)))
    assert [clip.bucket for clip in clips] == ["384x640", "640x384"]
    assert rejected == []
    clips, _ = parse(tmp_path, entry(), tall, sizes=((32, 32), (32, 48)))  # a table of one's own takes all
    assert [clip.bucket for clip in clips] == ["32x48", "32x32"]


@given(
    first=st.integers(0, 390), frames=st.integers(9, 40), fps=st.sampled_from([None, 24, 23, 16, 12, 9])
)  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_a_clip_is_the_frames_nearest_to_its_instants(long, first, frames, fps):
    last = min(400, first + frames)
    made = one(long, {"path": "a.mp4", "cut": [first, last], "crop": [0, 64, 0, 32]},
               sizes=((16, 32),), fps=fps, chunk_frames=1, min_frames=1)  # fmt: skip
    got = numbers(read_clip(made))
    step = 24 / fps if fps else 1
    assert len(got) == int((last - first - 1) / step + 1e-9) + 1
    for k, number in enumerate(got):
        assert abs(number - (first + k * step)) <= 0.5 + 1e-6


def test_incomplete_last_chunk_is_dropped(long):
    clip = one(long, {"path": "a.mp4", "cut": [3, 38], "crop": [0, 64, 0, 32]},
               sizes=((16, 32),), chunk_frames=9, min_frames=9)  # fmt: skip
    pixels = read_clip(clip)
    assert pixels.shape == (3, 9, 16, 32, 3)
    assert numbers(pixels) == list(range(3, 30))


def test_file_that_contradicts_its_list_gives_a_one_line_error(tmp_path):
    write(tmp_path / "a.mp4", range(20))
    small = {"path": "a.mp4", "crop": [0, 64, 0, 32]}
    options = {"sizes": ((16, 16),), "chunk_frames": 9, "min_frames": 9}
    (tmp_path / "bad.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:900])
    for change, message in (
        ({"path": "none.mp4"}, "no such file"),
        ({"path": "bad.mp4", "cut": [0, 20]}, "does not decode|frames decode of|has .* frames"),
        ({"cut": [0, 30]}, "has 20 frames, frame 20 is asked for"),
        ({"cut": [0, 9], "crop": [0, 96, 0, 32]}, r"crop \[0, 96, 0, 32\] .* not within its 64 x 32 pixels"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            read_clip(one(tmp_path, small | change, **options))
        assert "\n" not in str(error.value)


def test_the_middle_of_the_crop_is_kept_in_its_proportions():
    rows, columns = np.mgrid[0:60, 0:100].astype(np.uint8)
    frame = np.stack([rows, columns, rows], -1)
    wide = fit(frame, (10, 90, 0, 60), (30, 20))  # 60 x 40 of it: columns 30 to 70
    assert wide.shape == (30, 20, 3)
    np.testing.assert_allclose(wide[15, :, 1], np.arange(20) * 2 + 30.5, atol=1)
    np.testing.assert_allclose(wide[:, 10, 0], np.arange(30) * 2 + 0.5, atol=1)
    high = fit(frame, (0, 40, 0, 60), (10, 20))  # 20 x 40 of it: rows 20 to 40
    np.testing.assert_allclose(high[:, 10, 0], np.arange(10) * 2 + 20.5, atol=1)


@pytest.mark.reference
@given(height=st.integers(20, 90), width=st.integers(20, 90), seed=st.integers(0, 99), size=st.sampled_from(SIZES))
@settings(max_examples=10, deadline=None)
def test_pixels_equal_upstream_up_to_rounding(height, width, seed, size):
    """read_cut_crop_and_resize of dataloader_mp4_dist.py; torchvision's resize of tensors is this interpolation."""
    import torch

    size = (size[0] // 16, size[1] // 16)
    frame = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    ratio = size[0] / size[1]
    if height / width >= ratio:
        high = int(width * ratio)
        cut = frame[(height - high) // 2 :][:high]
    else:
        wide = int(height / ratio)
        cut = frame[:, (width - wide) // 2 :][:, :wide]
    video = torch.from_numpy(cut.copy()).float().permute(2, 0, 1)[None] / 127.5 - 1
    theirs = torch.nn.functional.interpolate(video, size=size, mode="bilinear", antialias=True, align_corners=False)
    ours = fit(frame, (0, width, 0, height), size).astype(np.float32) / 127.5 - 1
    np.testing.assert_allclose(ours, theirs[0].permute(1, 2, 0).numpy(), atol=1.5 / 127.5)


def test_seeking_gives_the_same_frames_as_reading_from_the_start(long, monkeypatch):
    decoded, decode = 0, video._decode

    def count(*arguments):
        nonlocal decoded
        for each in decode(*arguments):
            decoded += 1
            yield each

    monkeypatch.setattr(video, "_decode", count)
    for wanted in ([300, 301, 301, 390], [250], [399]):
        decoded = 0
        assert numbers(np.stack(list(frames_at(long / "a.mp4", wanted)))) == wanted
        assert decoded < 200  # x264's key frames are 250 apart at most
    with pytest.raises(ValueError, match="has 400 frames, frame 400 is asked for"):
        list(frames_at(long / "a.mp4", [390, 400]))


@pytest.mark.skipif(not REAL.is_dir(), reason="the real clips lie beside the repository")
def test_real_clips_as_upstream_lists_them():
    # Their list has the layout of upstream's toy_filter.json: clips of 81 and 129 frames.
    clips, rejected = read_lists([REAL / "clips_metadata_example.json"], REAL, Selection())
    assert [clip.chunks for clip in clips] == [3]
    assert "81 frames are fewer than --min-frames 121" in rejected[0].reason
    clips, _ = read_lists([REAL / "clips_metadata_example.json"], REAL, Selection(sizes=((64, 112),), min_frames=33))
    assert [clip.chunks for clip in clips] == [2, 3]
    for clip in clips:
        pixels = read_clip(clip)
        assert pixels.shape == (clip.chunks, 33, 64, 112, 3)
        first, _ = read_video(clip.file)
        np.testing.assert_array_equal(pixels[0, 0], fit(first[0], clip.crop, (64, 112)))
        np.testing.assert_array_equal(pixels[-1, -1], fit(first[33 * clip.chunks - 1], clip.crop, (64, 112)))
        assert pixels.std() > 20  # a picture, not grey
