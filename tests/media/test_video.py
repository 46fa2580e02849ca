"""Video files: what is written is read, in its colours and at its times, and wrong arguments are refused."""

import os
import struct
import wave
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from helios_jax.media.mp4 import VideoWriter
from helios_jax.media.video import iterate_video, read_video
from helios_jax.media.writers import FrameWriter
from tests.media.clip import FRAMES, psnr, write


@given(
    num=st.integers(1, 12),
    height=st.integers(1, 20).map(lambda n: 2 * n),
    width=st.integers(1, 20).map(lambda n: 2 * n),
    fps=st.sampled_from([8, 24, 30, 29.97, 12.5]),
)
@settings(max_examples=25, deadline=None)
def test_every_even_size_round_trips_with_all_frames(tmp_path_factory, num, height, width, fps):
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


@pytest.mark.parametrize(
    ("name", "fps", "size", "message"),
    [
        ("a.gif", 24, (64, 64), r"a\.gif: unknown suffix '\.gif'; .* \.mp4"),
        ("a", 24, (64, 64), "unknown suffix ''"),
        ("a.mp4", 24, (63, 64), "frames of 63x64; H.264 needs even height and width, such as 64x64"),
        ("a.mp4", 24, (0, 7), "such as 2x8"),
        ("a.mp4", 0, (64, 64), "0 frames a second; the rate must be positive"),
        ("a.mp4", float("nan"), (64, 64), "nan frames a second"),
        ("a.mp4", 2147483648, (64, 64), "2147483648 frames a second"),
        ("file/a.mp4", 24, (64, 64), "its folder cannot be made"),
        ("folder.mp4", 24, (64, 64), "is a folder; name a file in it"),
    ],
)
def test_invalid_arguments_are_refused_before_writing(tmp_path, name, fps, size, message):
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
def test_wrong_dtype_or_shape_is_refused(tmp_path, frames):
    with (
        VideoWriter(tmp_path / "a.mp4", 24, 64, 64) as video,
        pytest.raises(ValueError, match=r"they must be uint8 \[t, 64, 64, 3\]"),
    ):
        video.write(frames)


def test_file_without_video_is_refused_in_one_line(tmp_path):
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


def sound(path: Path, codec: str, *, cover: bool):
    """A file of sound only; `cover`: with the picture of a record's sleeve, which containers keep as a video stream."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=44100)
        if cover:
            picture = file.add_stream("mjpeg")
            picture.width, picture.height, picture.pix_fmt = 64, 64, "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic
            image = av.VideoFrame.from_ndarray(FRAMES[0], format="rgb24").reformat(format="yuvj420p")
            file.mux(picture.encode(image))
            file.mux(picture.encode(None))
        for i in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 44100, 1024 * i
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))


@pytest.mark.parametrize(("name", "codec", "cover"), [("a.mp4", "aac", False), ("a.mp3", "mp3", True)])
def test_sound_only_file_is_refused(tmp_path, name, codec, cover):
    sound(tmp_path / name, codec, cover=cover)
    with pytest.raises(ValueError, match="holds no video, only audio; name a file with a video stream") as error:
        read_video(tmp_path / name)
    assert str(error.value).startswith(str(tmp_path / name))


def ramp(path: Path, times: list[float], step: int = 8) -> Path:
    """A video whose frame i has the level step * i and is shown from times[i] on, in seconds."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=1000, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv444p"
        for i, time in enumerate(times):
            level = np.full((16, 16, 3), step * i, np.uint8)
            frame = av.VideoFrame.from_ndarray(level, format="rgb24").reformat(format="yuv444p")
            frame.pts = round(1000 * time)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def shown(path: Path, fps: float | None) -> list[int]:
    """The numbers of the frames of `ramp` that are read."""
    frames, rate = read_video(path, fps)
    assert fps is None or rate == fps
    return [round(frame.mean() / 8) for frame in frames]


def test_a_rate_picks_the_nearest_frames(tmp_path):
    path = ramp(tmp_path / "a.mp4", [i / 30 for i in range(30)])
    assert shown(path, None) == shown(path, 30) == list(range(30))
    assert shown(path, 15) == list(range(0, 30, 2))
    assert shown(path, 60) == [i for i in range(30) for _ in range(2)]
    assert shown(path, 24) == [round(i * 30 / 24 - 1e-3) for i in range(24)]
    assert shown(path, 0.01) == [0]
    # Frames at uneven times, as phones and screen recorders write them: what counts is when a frame is shown.
    uneven = ramp(tmp_path / "b.mp4", [1.0, 1.1, 1.2, 1.9, 2.0])
    assert shown(uneven, 10)[:10] == [0, 1, 2, 2, 2, 2, 3, 3, 3, 3]
    for fps in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="the rate must be positive, such as 24"):
            read_video(path, fps)


def test_iterate_video_equals_read_video(tmp_path):
    path = ramp(tmp_path / "a.mp4", [i / 30 for i in range(12)])
    for fps in (None, 24):
        np.testing.assert_array_equal(np.stack(list(iterate_video(path, fps))), read_video(path, fps)[0])
    frames = iterate_video(path)
    next(frames)
    frames.close()  # nothing is left open
    (tmp_path / "b.mp4").write_bytes(path.read_bytes()[:-1500])
    with pytest.raises(ValueError, match=r"b\.mp4"):
        list(iterate_video(tmp_path / "b.mp4", 24))


@pytest.mark.parametrize(
    ("matrix", "seen"),
    [
        ((0, 1, -1, 0), lambda x: np.rot90(x, -1)),
        ((-1, 0, 0, -1), lambda x: x[::-1, ::-1]),
        ((0, -1, 1, 0), lambda x: np.rot90(x)),
        ((-1, 0, 0, 1), lambda x: x[:, ::-1]),
        ((1, 0, 0, -1), lambda x: x[::-1]),
        ((0, 1, 1, 0), lambda x: x.swapaxes(0, 1)),
        ((0, -1, -1, 0), lambda x: x[::-1, ::-1].swapaxes(0, 1)),
    ],
)
def test_orientation_metadata_gives_upright_frames(tmp_path, matrix, seen):
    frames = np.zeros((2, 32, 64, 3), np.uint8)
    frames[:, :16, :32], frames[:, :16, 32:], frames[:, 16:, :32] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    data = bytearray(write(tmp_path / "a.mp4", frames).read_bytes())
    # The matrix of the track (ISO 14496-12, 8.3.2): (x, y) -> (a x + c y, b x + d y).
    a, b, c, d = (x << 16 for x in matrix)
    start = data.index(b"tkhd") + 44
    data[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    (tmp_path / "b.mp4").write_bytes(data)
    got, _ = read_video(tmp_path / "b.mp4")
    assert got.shape[1:] == seen(frames[0]).shape
    assert np.abs(got[0].astype(int) - seen(read_video(tmp_path / "a.mp4")[0][0])).max() == 0


COLOURS = [(200, 40, 60), (255, 255, 255), (10, 250, 30), (64, 64, 200)]


@pytest.mark.parametrize("colour", COLOURS)
def test_colours_are_bt709_and_tagged(tmp_path, colour):
    path = write(tmp_path / "a.mp4", np.broadcast_to(np.array(colour, np.uint8), (2, 64, 64, 3)))
    with av.open(str(path)) as file:
        frame = next(file.decode(video=0))
        context = file.streams.video[0].codec_context
        tags = context.color_primaries, context.color_trc, context.colorspace, context.color_range
    assert tags == (1, 1, 1, 1)
    y, u, v = (
        np.frombuffer(plane, np.uint8).reshape(plane.height, -1)[:, : plane.width].mean() for plane in frame.planes
    )
    y, u, v = (y - 16) / 219, (u - 128) / 224, (v - 128) / 224
    rgb = 255 * np.array([y + 1.5748 * v, y - 0.18733 * u - 0.46813 * v, y + 1.8556 * u])
    assert np.abs(rgb - colour).max() < 4
    assert np.abs(read_video(path)[0].astype(int) - colour).max() < 4


@pytest.mark.parametrize(("space", "full"), [(5, 1), (5, 2), (1, 1), (1, 2)])
def test_reading_honours_the_tags_of_colours(tmp_path, space, full):
    with av.open(str(tmp_path / "a.mp4"), "w") as file:
        stream = file.add_stream("libx264", rate=24, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = space, full
        frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), COLOURS[0], np.uint8), format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace=space, dst_color_range=full)
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    assert np.abs(read_video(tmp_path / "a.mp4")[0].astype(int) - COLOURS[0]).max() < 5


def test_trimmed_copy_gives_its_visible_frames(tmp_path):
    """A copy that begins at the key frame 48 and whose edit list hides the frames before 60."""
    with av.open(str(tmp_path / "a.mp4"), "w") as file:
        stream = file.add_stream("libx264", rate=24, options={"g": "48", "crf": "10", "sc_threshold": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for i in range(120):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((64, 64, 3), 2 * i, np.uint8), format="rgb24")))
        file.mux(stream.encode(None))
    with av.open(str(tmp_path / "a.mp4")) as source, av.open(str(tmp_path / "b.mp4"), "w") as file:
        stream = source.streams.video[0]
        copy, start = file.add_stream_from_template(stream), int(2.5 / stream.time_base)
        source.seek(start, stream=stream)
        for packet in source.demux(stream):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - start, packet.dts - start, copy
                file.mux(packet)
    got, _ = read_video(tmp_path / "b.mp4")
    assert [round(frame.mean() / 2) - 60 for frame in got] == pytest.approx(list(range(60)), abs=1)


def test_animated_webp_and_folder_of_frames_are_read(tmp_path):
    images = [Image.fromarray(frame) for frame in FRAMES[:5]]
    images[0].save(tmp_path / "a.webp", save_all=True, append_images=images[1:], duration=100, lossless=True)
    got, rate = read_video(tmp_path / "a.webp")
    np.testing.assert_array_equal(got, FRAMES[:5])
    assert rate == 10
    writer = FrameWriter(tmp_path / "frames")
    writer.write(FRAMES[:5])
    np.testing.assert_array_equal(np.stack(list(iterate_video(tmp_path / "frames"))), FRAMES[:5])
    (tmp_path / "frames" / "000002.png").unlink()
    with pytest.raises(ValueError, match=r"000002\.png is missing"):
        read_video(tmp_path / "frames")


def test_unusable_paths_are_refused_in_one_line(tmp_path):
    os.mkfifo(tmp_path / "fifo.mp4")
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\nfifo.mp4\n")
    for path in (tmp_path, tmp_path / "fifo.mp4", tmp_path / "list.mp4", Path("/dev/zero"), tmp_path / ("a" * 300)):
        with pytest.raises(ValueError) as error:
            read_video(path)
        assert "\n" not in str(error.value)
    for path in (tmp_path / "fifo.mp4", tmp_path / ("a" * 300 + ".mp4")):
        with pytest.raises(ValueError) as error:
            VideoWriter(path, 24, 64, 64)
        assert "\n" not in str(error.value)


def test_names_like_protocols_are_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("file:x.mp4", "take:1.mp4", "tcp://x.mp4"):
        write(name, FRAMES[:3])
        assert len(read_video(name)[0]) == 3
        assert Path(name).is_file()
