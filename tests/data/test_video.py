"""Video files: what is written plays while it grows, and a damaged file is refused instead of half read."""

import os
import signal
import subprocess
import sys
import wave

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helios_jax.data import toy
from helios_jax.data.video import VideoWriter, read_video

FRAMES = toy.render(toy.sample_scene(1, "train"), 33)


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2))


def write(path, frames=FRAMES, fps=24):
    with VideoWriter(path, fps, *frames.shape[1:3]) as video:
        video.write(frames)
    return path


@given(
    num=st.integers(1, 12),
    height=st.integers(1, 20).map(lambda n: 2 * n),
    width=st.integers(1, 20).map(lambda n: 2 * n),
    fps=st.sampled_from([8, 24, 30, 29.97, 12.5]),
)
@settings(max_examples=25, deadline=None)
def test_every_even_size_comes_back_with_all_its_frames(tmp_path_factory, num, height, width, fps):
    levels = np.linspace(40, 210, num).astype(np.uint8)
    frames = np.broadcast_to(levels[:, None, None, None], (num, height, width, 3))
    got, rate = read_video(write(tmp_path_factory.mktemp("video") / "a.mp4", frames, fps))
    assert got.shape == frames.shape
    assert got.dtype == np.uint8
    assert rate == pytest.approx(fps, rel=1e-3)
    assert np.abs(got.astype(int) - frames).max() < 12


def test_pictures_survive_in_order_over_several_writes(tmp_path):
    with VideoWriter(tmp_path / "new" / "folder" / "a.mp4", 24, 64, 64) as video:
        video.write(FRAMES[:20])
        video.write(FRAMES[20:20])
        video.write(FRAMES[20:])
        assert video.frames == 33
    got, _ = read_video(video.path)
    assert psnr(got, FRAMES) > 30  # colour is stored at half the size
    assert all(psnr(a, b) > 28 for a, b in zip(got, FRAMES))


def test_a_file_that_is_still_written_plays(tmp_path):
    video = VideoWriter(tmp_path / "a.mp4", 24, 64, 64)
    for i in range(3):
        video.write(FRAMES[10 * i : 10 * i + 10])
        # The newest frame waits for the next one, which tells how long it is shown.
        assert len(read_video(tmp_path / "a.mp4")[0]) == 10 * i + 9
    video.close()
    video.close()
    assert len(read_video(tmp_path / "a.mp4")[0]) == 30


def test_a_killed_process_leaves_a_file_that_plays(tmp_path):
    code = f"""
import numpy as np, time
from helios_jax.data.video import VideoWriter
video = VideoWriter({str(tmp_path / "a.mp4")!r}, 24, 64, 64)
video.write(np.zeros((20, 64, 64, 3), np.uint8))
print("written", flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert len(read_video(tmp_path / "a.mp4")[0]) == 19


def test_an_error_while_writing_still_completes_the_file(tmp_path):
    def interrupted():
        with VideoWriter(tmp_path / "a.mp4", 24, 64, 64) as video:
            video.write(FRAMES)
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        interrupted()
    assert len(read_video(tmp_path / "a.mp4")[0]) == 33


@pytest.mark.parametrize(
    ("name", "fps", "size", "message"),
    [
        ("a.gif", 24, (64, 64), r"a\.gif: unknown suffix '\.gif'; .* \.mp4"),
        ("a", 24, (64, 64), "unknown suffix ''"),
        ("a.mp4", 24, (63, 64), "frames of 63x64; H.264 needs even height and width, such as 64x64"),
        ("a.mp4", 24, (0, 7), "such as 2x8"),
        ("a.mp4", 0, (64, 64), "0 frames a second; the rate must be positive"),
        ("a.mp4", float("nan"), (64, 64), "nan frames a second"),
        ("file/a.mp4", 24, (64, 64), "its folder cannot be made"),
        ("folder.mp4", 24, (64, 64), "is a folder; name a file in it"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is(tmp_path, name, fps, size, message):
    (tmp_path / "file").touch()
    (tmp_path / "folder.mp4").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message) as error:
        VideoWriter(tmp_path / name, fps, *size)
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="writing there is not permitted; name another folder"):
        VideoWriter(tmp_path / "a.mp4", 24, 64, 64)


@pytest.mark.parametrize("frames", [FRAMES.astype(np.float32), FRAMES[0], FRAMES[:, :32], FRAMES[..., :1]])
def test_frames_of_another_kind_are_refused(tmp_path, frames):
    with (
        VideoWriter(tmp_path / "a.mp4", 24, 64, 64) as video,
        pytest.raises(ValueError, match=r"they must be uint8 \[t, 64, 64, 3\]"),
    ):
        video.write(frames)


def test_what_holds_no_video_is_refused_in_one_line(tmp_path):
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(16000))
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video " * 99)
    for name, message in {
        "sound.wav": "holds no video, only audio; name a file with a video stream",
        "empty.mp4": "does not decode as video",
        "text.mp4": "does not decode as video",
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            read_video(tmp_path / name)
        assert "\n" not in str(error.value)
        assert name in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"nothing\.mp4: no such file"):
        read_video(tmp_path / "nothing.mp4")
    with VideoWriter(tmp_path / "none.mp4", 24, 64, 64):
        pass
    assert not (tmp_path / "none.mp4").exists()


def fragments(data):
    """Where each frame's part of the file begins."""
    return [i - 4 for i in range(len(data)) if data[i : i + 4] == b"moof"]


def test_lost_frames_are_noticed(tmp_path):
    data = write(tmp_path / "a.mp4").read_bytes()
    starts = fragments(data)
    assert len(starts) == 33
    for k in (1, 10, 20):
        (tmp_path / "b.mp4").write_bytes(data[: starts[k]] + data[starts[k + 1] :])
        with pytest.raises(ValueError, match=r"b\.mp4"):
            read_video(tmp_path / "b.mp4")


@pytest.mark.parametrize("where", [0.3, 0.6, 0.9])
def test_a_file_cut_anywhere_is_refused_or_gives_its_first_frames(tmp_path, where):
    frames, _ = read_video(write(tmp_path / "a.mp4"))
    data = (tmp_path / "a.mp4").read_bytes()
    for end in range(int(where * len(data)), int(where * len(data)) + 8):
        (tmp_path / "b.mp4").write_bytes(data[:end])
        try:
            got, _ = read_video(tmp_path / "b.mp4")
        except ValueError:
            continue
        np.testing.assert_array_equal(got, frames[: len(got)])


def test_most_damage_is_refused_in_one_line(tmp_path):
    # Not all: H.264 has no checksum, and some changed bits are another valid picture.
    data = write(tmp_path / "a.mp4").read_bytes()
    lines = []
    for start in np.random.default_rng(0).integers(1500, len(data) - 8, 40):
        broken = bytearray(data)
        broken[start : start + 8] = bytes(b ^ 0x5A for b in data[start : start + 8])
        (tmp_path / "b.mp4").write_bytes(broken)
        try:
            read_video(tmp_path / "b.mp4")
        except ValueError as error:
            lines.append(str(error))
    assert len(lines) > 20
    assert not any("\n" in line for line in lines)
