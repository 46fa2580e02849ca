"""Frames as upstream reads them, the frames that metrics choose, motion amplitude, and jumps at borders of chunks."""

import json
import weakref
from pathlib import Path

import numpy as np
import pytest

from helios_jax.heliosbench import drift
from helios_jax.heliosbench.amplitude import Amplitude
from helios_jax.heliosbench.bench_frames import count_frames, read_frames, target_size
from helios_jax.heliosbench.border_jumps import BorderJumps
from helios_jax.heliosbench.metric import Clip, Measured, Metric
from helios_jax.media.mp4 import VideoWriter
from helios_jax.sampling.chunk_frames import ChunkFrames

REAL = Path(__file__).resolve().parents[3] / "shared" / "heliosbench"
real = pytest.mark.skipif(not REAL.is_dir(), reason="upstream's clips are not beside the checkout")


def write(path: Path, frames: np.ndarray) -> Path:
    with VideoWriter(path, 24, *frames.shape[1:3]) as video:
        video.write(frames)
    return path


def measure(metric: Metric, path: Path, box=(384, 640)) -> Measured:
    meter = metric.begin(Clip("", count_frames(path)))
    for frame in read_frames(path, box):
        meter.add(frame)
    return meter.finish()


@pytest.mark.parametrize(
    ("size", "box", "target"),
    [
        ((480, 832), (384, 640), (368, 640)),
        ((384, 640), (384, 640), (384, 640)),
        ((640, 384), (384, 640), (1066, 640)),
        ((480, 832), (640, 384), (640, 1108)),
        ((100, 101), (384, 640), (632, 640)),
    ],
)
def test_sizes(size, box, target):
    assert target_size(*size, box) == target


@real
@pytest.mark.parametrize(("name", "frames"), [("2_240_ori81.mp4", 81), ("239_120_ori129.mp4", 129)])
def test_motion_amplitude_equals_the_published_number(name, frames):
    pytest.importorskip("cv2")
    data = json.loads((REAL / "toy-video" / "motion_amplitude_results.json").read_text())
    score = {item["video_name"]: item["motion_fb"] for item in data["per_video_results"]}[name]
    measured = measure(Amplitude(), REAL / "videos" / name)
    assert measured.scores["motion_amplitude"]["motion_fb"] == pytest.approx(score, abs=1e-6)
    assert len(measured.curve) == frames - 1


@real
def test_the_three_forms_of_a_frame_show_the_same():
    pytest.importorskip("cv2")
    frame = next(read_frames(REAL / "videos" / "2_240_ori81.mp4", (384, 640)))
    assert (frame.scaled.shape, frame.resized.shape) == ((368, 640, 3), (368, 640, 3))
    assert (frame.picture.shape, frame.rgb.shape) == ((295, 512, 3), (480, 832, 3))
    assert np.abs(frame.scaled.astype(int) - frame.resized).mean() < 4


def test_colours_of_a_video_in_bt709(tmp_path):
    """Our own videos name their matrix."""
    colours = np.array([[200, 30, 40], [30, 180, 60], [40, 60, 220], [128, 128, 128]], np.uint8)
    path = write(tmp_path / "a.mp4", np.tile(colours.repeat(32, 0), (3, 64, 1, 1)))
    frame = next(read_frames(path, (64, 128)))
    np.testing.assert_allclose(frame.scaled[32, 16::32], colours, atol=4)


def test_still_and_opposite_motion_have_no_amplitude(tmp_path):
    pytest.importorskip("cv2")
    noise = np.random.default_rng(0).integers(0, 255, (32, 64, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    still = write(tmp_path / "still.mp4", np.stack([noise] * 3))
    assert measure(Amplitude(), still, (128, 256)).scores["motion_amplitude"]["motion_fb"] < 1e-3
    moves = write(tmp_path / "moves.mp4", np.stack([np.roll(noise, 3 * i, 1) for i in range(4)]))
    score = measure(Amplitude(), moves, (128, 256)).scores["motion_amplitude"]["motion_fb"]
    assert score == pytest.approx(1.5, abs=0.4)  # 3 pixels across, 0 down
    one = write(tmp_path / "one.mp4", noise[None])
    assert measure(Amplitude(), one, (128, 256)).scores["motion_amplitude"]["motion_fb"] == 0


def test_border_jumps(tmp_path):
    """Brightness grows by 1 a frame, and by 11 at the borders of chunks of 4."""
    levels = np.array([i + 10 * (i // 4) for i in range(12)], np.uint8) + 60
    path = write(tmp_path / "a.mp4", np.ones((12, 64, 64, 3), np.uint8) * levels[:, None, None, None])
    found = measure(BorderJumps(ChunkFrames(4, 4)), path, (64, 64))
    scores = found.scores["border_jumps"]
    assert scores["border_jumps_score"] == pytest.approx(10, abs=0.8)
    assert scores["across_borders"] - scores["within_chunks"] == scores["border_jumps_score"]
    assert [number for number, value in found.curve if value > 6] == [4, 8]
    found = measure(
        BorderJumps(ChunkFrames(5, 4)), path, (64, 64)
    )  # chunks of 5 that overlap by one: 5, 4 and 3 frames
    assert found.scores["border_jumps"]["border_jumps_score"] < 0
    assert measure(BorderJumps(ChunkFrames(33, 33)), path, (64, 64)).scores == {}


def test_chosen_frames():
    """Numbers worked out by hand from upstream's formulas."""
    assert drift.ends(100) == (range(15), range(85, 100))
    assert drift.ends(5) == (range(1), range(4, 5))
    assert drift.ends(10, 4) == (range(4), range(6, 10))
    assert drift.ends(3, 4) == (range(3), range(3))
    assert drift.middles(16, 8) == [0, 2, 4, 6, 8, 10, 12, 14]
    assert drift.middles(81, 8) == [4, 14, 24, 34, 44, 54, 64, 75]
    assert drift.middles(3, 8) == [0, 1, 2, 2, 2, 2, 2, 2]
    assert drift.sampled_ends(100, 8) == (
        [0, 1, 3, 5, 7, 9, 11, 13],
        [85, 86, 88, 90, 92, 94, 96, 98],
    )
    # 20 frames: 3 at each end, widened to 8 on the side where there is room.
    assert drift.sampled_ends(20, 8) == (list(range(8)), list(range(12, 20)))
    assert drift.strided(81, 16) == [5 * i for i in range(16)]
    assert drift.strided(4, 16) == [0, 1, 2, 3]
    assert drift.strided_ends(200, 16) == ([*range(0, 16)], [*range(170, 186)])
    assert drift.strided_ends(20, 16) == ([0, 1, 2], [17, 18, 19])


def test_frames_are_not_kept(tmp_path):
    """However long a video is, a few frames of it are in memory."""
    path = write(tmp_path / "a.mp4", np.zeros((200, 16, 16, 3), np.uint8))
    alive, most = set(), 0
    for frame in read_frames(path, (16, 16)):
        alive.add(frame.number)
        weakref.finalize(frame, alive.discard, frame.number)
        most = max(most, len(alive))
        del frame
    assert most <= 2
