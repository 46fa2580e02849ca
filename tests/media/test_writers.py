"""Chunks written in a thread: a slow writer delays nothing, no chunk is lost, and errors are raised."""

import os
import threading
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from helios_jax.media import writers as output
from helios_jax.media.mp4 import VideoWriter
from helios_jax.media.video import read_video
from helios_jax.media.writers import FrameWriter, LatentWriter, ThreadedWriter


class Gate:
    """A writer that waits until it is let through, and fails where told to."""

    path, takes = Path("x"), "np"

    def __init__(self, error: Exception | None = None, at: int = 0):
        self.open = threading.Event()
        self.written, self.frames, self.closed = [], 0, 0
        self.error, self.at = error, at

    def write(self, chunk):
        assert self.open.wait(10)
        if self.error is not None and chunk == self.at:
            raise self.error
        self.written.append(chunk)
        self.frames += 1

    def close(self):
        self.closed += 1


def test_slow_writer_blocks_only_when_two_chunks_wait():
    gate = Gate()
    writer = ThreadedWriter(gate)
    writer.write(0)
    writer.write(1)
    third = threading.Thread(target=writer.write, args=(2,))
    third.start()
    third.join(0.2)
    assert third.is_alive()
    assert (gate.written, writer.frames) == ([], 0)
    gate.open.set()
    third.join(10)
    assert not third.is_alive()
    writer.close()
    assert gate.written == [0, 1, 2]


def test_callback_runs_after_its_chunk_is_written():
    gate, seen = Gate(), []
    writer = ThreadedWriter(gate)
    for chunk in range(2):
        writer.write(chunk, lambda chunk=chunk: seen.append((chunk, writer.frames)))
    assert seen == []
    gate.open.set()
    writer.close()
    assert seen == [(0, 1), (1, 2)]


def test_close_waits_for_all_chunks():
    gate = Gate()
    writer = ThreadedWriter(gate)
    writer.write(0)
    writer.write(1)
    threading.Timer(0.2, gate.open.set).start()
    writer.close()
    assert (gate.written, gate.closed) == ([0, 1], 1)


@pytest.mark.parametrize("error", [ValueError("frames of another size"), OSError(28, "No space left on device")])
@pytest.mark.parametrize("call", [lambda writer: writer.write(2), lambda writer: writer.close()])
def test_error_is_raised_once_and_stops_writing(error, call):
    gate, after = Gate(error, at=0), []
    writer = ThreadedWriter(gate)
    for chunk in range(2):
        writer.write(chunk, lambda: after.append(1))
    gate.open.set()
    with pytest.raises(type(error)) as raised:
        call(writer)
    assert raised.value is error
    writer.close()
    assert (gate.written, after) == ([], [])
    assert gate.closed >= 1


def test_callback_error_is_raised():
    def full():
        raise OSError(28, "No space left on device")

    gate = Gate()
    gate.open.set()
    writer = ThreadedWriter(gate)
    writer.write(0, full)
    with pytest.raises(OSError, match="No space"):
        writer.close()
    assert (gate.written, gate.closed) == ([0], 1)


@pytest.mark.parametrize("error", [None, OSError(28, "No space left on device")])
def test_interrupt_loses_no_queued_chunk_and_no_error(monkeypatch, error):
    def interrupt(_):
        raise KeyboardInterrupt

    gate = Gate(error)
    writer = ThreadedWriter(gate)
    writer.write(0)
    writer.write(1)
    with monkeypatch.context() as patch:
        patch.setattr(output, "wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            writer.write(2)
    gate.open.set()
    with nullcontext() if error is None else pytest.raises(OSError, match="No space"):
        writer.close()
    assert (gate.written, gate.closed) == ([0, 1] if error is None else [], 1)


def test_full_disk_leaves_no_part_of_a_file(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    frames, latents = FrameWriter(tmp_path / "frames"), LatentWriter(tmp_path / "a.npz")
    frames.write(np.zeros((1, 8, 8, 3), np.uint8))
    latents.write(np.zeros((1, 8, 8, 3), np.float32))
    before = (tmp_path / "a.npz").read_bytes()
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match=r"No space left on device.*000001\.png"):
        frames.write(np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(OSError, match=r"No space left on device.*a\.npz"):
        latents.write(np.zeros((1, 8, 8, 3), np.float32))
    assert [path.name for path in (tmp_path / "frames").iterdir()] == ["000000.png"]
    assert (tmp_path / "a.npz").read_bytes() == before
    assert not (tmp_path / ".a.npz").exists()


def test_only_regular_files_are_written(tmp_path):
    os.mkfifo(tmp_path / "a.npz")
    for make in (lambda: LatentWriter(tmp_path / "a.npz"), lambda: FrameWriter("/dev/full")):
        with pytest.raises(ValueError, match="device"):
            make()
    assert (tmp_path / "a.npz").is_fifo()


def test_an_mp4_goes_on_where_it_was_cut(tmp_path):
    """After whole, cut and torn files: what is kept stays as it is, byte for byte, until a frame is written."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (12, 16, 16, 1, 1, 3), np.uint8).repeat(4, 3).repeat(4, 4)
    frames = frames.transpose(0, 1, 3, 2, 4, 5).reshape(12, 64, 64, 3)
    path = tmp_path / "x.mp4"
    with VideoWriter(path, 24, 64, 64) as writer:
        writer.write(frames[:7])
    whole = path.read_bytes()
    for data, keep, kept in ((whole, 7, 7), (whole, 5, 5), (whole, 99, 7), (whole[: whole.rfind(b"mdat") + 100], 7, 6)):
        path.write_bytes(data)
        writer = VideoWriter(path, 24, 64, 64, keep)
        assert (writer.frames, path.read_bytes()) == (kept, data)
        writer.write(frames[kept:])
        writer.close()
        got = read_video(path)[0].astype(int)
        assert len(got) == 12
        assert all(np.abs(frames - frame).mean((1, 2, 3)).argmin() == i for i, frame in enumerate(got))
        VideoWriter(path, 24, 64, 64, keep=99).close()
        np.testing.assert_array_equal(read_video(path)[0], got)
    for fps, height in ((30, 64), (24, 32)):
        with pytest.raises(ValueError, match="another size, rate or encoder"):
            VideoWriter(path, fps, height, 64, keep=3)
    np.testing.assert_array_equal(read_video(path)[0], got)
