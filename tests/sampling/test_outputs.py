"""Files of a run: none that is there is lost, and what is no file is refused before anything is read or written."""

import json
import os
from pathlib import Path

import pytest

from helios_jax.media.video import read_video
from helios_jax.sampling import one_video, outputs
from helios_jax.sampling.chunk_frames import ChunkFrames
from helios_jax.sampling.jobs import make_jobs
from helios_jax.sampling.options import SampleConfig
from helios_jax.sampling.stream_state import read_state
from tests.tiny_run import run


def check(out: Path, **changes) -> None:
    (job,) = make_jobs(SampleConfig(prompt="a", out=str(out), **changes), ChunkFrames(33, 33))
    outputs.check(job)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("state", ["pipe", ".", "/dev/full"])
def test_a_state_is_a_regular_file(tmp_path, state, overwrite):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"is a (folder|device)"):
        check(tmp_path / "x.mp4", state=str(tmp_path / state), overwrite=overwrite)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_is_no_video_file(tmp_path, overwrite):
    (tmp_path / "x.mp4").mkdir()
    with pytest.raises(ValueError, match=r"x\.mp4: is a folder"):
        check(tmp_path / "x.mp4", overwrite=overwrite)


def test_frames_are_replaced_and_other_pictures_are_not(tmp_path):
    for name in ("000000.png", "notes.txt"):
        (tmp_path / name).touch()
    check(tmp_path, overwrite=True)
    (tmp_path / "me.png").touch()
    with pytest.raises(ValueError, match=r"holds me\.png, which is no frame of a video: name a new folder"):
        check(tmp_path, overwrite=True)


@pytest.mark.parametrize("text", ["3", "[]", "null", "{", "[" * 100_000, "\xff"])
def test_a_file_that_holds_no_facts_is_another_file(tmp_path, text):
    (tmp_path / "x.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"x\.json.* is another file"):
        check(tmp_path / "x.mp4")
    check(tmp_path / "x.mp4", overwrite=True)


def test_a_state_that_is_no_file_is_no_state(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(ValueError, match="not the state of a stream"):
            read_state(path)


def test_the_home_folder_is_named_by_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    config = SampleConfig(prompt="a", out="~/x.mp4", state="~/s", loras=["~/l.safetensors=0.5"])
    assert (config.out, config.state) == ("/home/someone/x.mp4", "/home/someone/s")
    assert config.loras == ["/home/someone/l.safetensors=0.5"]


@pytest.mark.parametrize(
    ("there", "arguments", "words"),
    [
        ("video.mp4", [], ["out", "is there already", "--overwrite"]),
        ("video.json", [], ["video.json", "another file"]),
        ("s.state", ["--state", "s.state"], ["state", "--resume"]),
        (None, ["--video", "video.mp4"], ["out", "is the run's video"]),
        (None, ["--state", "video.mp4"], ["state", "is also out"]),
        (None, ["--state", "video.json"], ["state", "is also the JSON"]),
    ],
)
def test_nothing_that_is_there_is_overwritten_unasked(config, tmp_path, capsys, monkeypatch, there, arguments, words):
    monkeypatch.chdir(tmp_path)
    if there is not None:
        (tmp_path / there).write_text("{}")
    assert run(config, *arguments, "--out", tmp_path / "video.mp4", "--num-frames", 9) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(word in error for word in words), error
    if there is not None:
        assert (tmp_path / there).read_text() == "{}"
        assert run(config, *arguments, "--out", tmp_path / "video.mp4", "--num-frames", 9, "--overwrite") == 0
        assert len(read_video(tmp_path / "video.mp4")[0]) == 9


@pytest.mark.parametrize("out", ["x.mp4", "x.npz", "x"])
def test_a_video_that_was_begun_is_made_again(config, tmp_path, capsys, monkeypatch, out):
    """A killed run leaves half a video and its facts: the same command makes it whole, another does not touch it."""
    arguments = ["--out", tmp_path / out, "--num-frames", 27]
    with monkeypatch.context() as patch:
        patch.setattr(one_video, "_figures", lambda *_: (_ for _ in ()).throw(SystemExit(137)))
        with pytest.raises(SystemExit):
            run(config, *arguments)
    assert json.loads((tmp_path / "x.json").read_text())["complete"] is False
    assert run(config, *arguments, "--seed", 1) == 2
    assert "is there already" in capsys.readouterr().err
    assert run(config, *arguments) == 0
    assert json.loads((tmp_path / "x.json").read_text())["complete"] is True
    assert run(config, *arguments) == 2
