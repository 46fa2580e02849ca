"""sample.py as a person uses it: the file it makes, what it prints, and how it refuses."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import sample
from helios_jax.data.video import read_video
from tests import tiny

ROOT = Path(sample.__file__).parent
# sample.py where Ctrl-C works: a job in the background of a shell inherits an ignored SIGINT, and so do its children.
LISTENING = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_path("sample.py", run_name="__main__")
"""
CONFIG = """
prompt: a red plus
height: 32
width: 48
num_inference_steps: 2
num_latent_frames_per_chunk: 3
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.folder(tmp_path_factory.mktemp("tiny") / "pipeline")


@pytest.fixture
def config(tmp_path, folder):
    path = tmp_path / "sample.yaml"
    path.write_text(f"{CONFIG}model: {folder}\nout: {tmp_path}/video.mp4\n")
    return path


def test_a_video_of_exactly_the_frames_and_its_figures(config, tmp_path, capsys):
    out = tmp_path / "new" / "x.mp4"
    argv = [str(config), "--prompt", "a ${blue} bar: 'moves'", "--num-frames", "22", "--out", str(out), "seed=3"]
    assert sample.main(argv) == 0
    frames, rate = read_video(out)
    assert frames.shape == (22, 32, 48, 3)
    assert rate == 24
    printed = capsys.readouterr().out
    for word in ("time to first chunk", "seconds a chunk", "frames/s", "peak host memory", str(out)):
        assert word in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--height", "40"], ["height", "16", "32 and 48"]),
        (["--num-frames", "0"], ["num_frames", "at least 1"]),
        (["--num-frames", "many"], ["--num-frames", "num_frames"]),
        (["--prompt", " "], ["prompt"]),
        (["--seed", "-1"], ["seed"]),
        (["--model", "nowhere"], ["no folder nowhere"]),
        (["--out", "/proc/none/x.mp4"], ["/proc/none"]),
        (["--out", "x.gif"], [".gif", ".mp4"]),
        (["guidence_scale=2"], ["guidence_scale", "guidance_scale"]),
        (["precision=half"], ["precision"]),
    ],
)
def test_bad_input_is_one_line_and_code_2(arguments, words, config, tmp_path, capsys):
    assert sample.main([str(config), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(word in error for word in words), error
    assert not list(tmp_path.glob("*.mp4"))


def test_unknown_config(capsys):
    assert sample.main(["configs/toy/sampel.yaml"]) == 2
    assert "configs/toy/sampel.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_a_playable_video(number, config, tmp_path):
    command = [sys.executable, "-c", LISTENING, str(config), "--num-frames", "90000"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("chunk 2/"):
                break
        process.send_signal(number)
        begin, rest = time.monotonic(), process.stdout.read()
        assert process.wait(30) == 130
    assert time.monotonic() - begin < 30
    assert "interrupted" in rest
    frames, _ = read_video(tmp_path / "video.mp4")
    assert len(frames) >= 18
    assert len(frames) % 9 == 0
