"""A video file plays while it is written, whatever ends the writing, and a damaged one is refused."""

import errno
import io
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from helios_jax.media.mp4 import VideoWriter
from helios_jax.media.video import read_video
from tests.media.clip import FRAMES, write


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
from helios_jax.media.mp4 import VideoWriter
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


def test_full_disk_keeps_whole_frames(tmp_path, monkeypatch):
    room = 8000

    class Full(io.FileIO):
        def write(self, data):
            if self.tell() + len(data) > room:
                super().write(data[: max(0, room - self.tell())])
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    monkeypatch.setattr(Path, "open", lambda self, *_, **__: Full(self, "wb"))
    video = VideoWriter(tmp_path / "a.mp4", 24, 64, 64)
    with pytest.raises(OSError, match=r"No space left on device.*a\.mp4"):
        video.write(FRAMES)
    video.close()
    monkeypatch.undo()
    assert 0 < len(read_video(tmp_path / "a.mp4")[0]) < 33


def fragments(data):
    """Positions in the file at which the frames' parts begin."""
    return [i - 4 for i in range(len(data)) if data[i : i + 4] == b"moof"]


def test_lost_frames_are_detected(tmp_path):
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
