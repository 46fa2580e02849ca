"""sample.py as a person uses it: the file it makes, what it prints, and how it refuses."""

import errno
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from jax.errors import JaxRuntimeError
from PIL import Image
from safetensors.numpy import save_file

import sample
from helios_jax import HeliosPipeline
from helios_jax.media.mp4 import VideoWriter
from helios_jax.media.video import read_video
from helios_jax.media.writers import LatentWriter
from helios_jax.sampling import one_video, pipeline
from helios_jax.sampling import run as runs
from helios_jax.sampling.stream import Stream
from helios_jax.sampling.stream_state import read_state
from tests.closeness import assert_close
from tests.tiny_run import run

ROOT = Path(sample.__file__).parent
# sample.py where Ctrl-C works: a job in the background of a shell inherits an ignored SIGINT, and so do its children.
LISTENING = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_path("sample.py", run_name="__main__")
"""
LONG = "n" * 300  # more than a file's name may have


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
        (["--num-frames", "0"], ["--num-frames must be at least 1"]),
        (["--num-frames", "many"], ["--num-frames must be a whole number or null, got 'many'"]),
        (["--prompt", " "], ["prompt"]),
        (["--seed", "-1"], ["seed"]),
        (["--model", "nowhere"], ["no folder nowhere"]),
        (["--out", "/proc/none/x.mp4"], ["/proc/none"]),
        (["--out", "x.gif"], [".gif", ".mp4"]),
        (["guidence_scale=2"], ["guidence_scale", "guidance_scale"]),
        (["precision=half"], ["precision"]),
        (["--attention", "pallas"], ["attention", "runs on cpu", "'xla'"]),
        (["--norms", "pallas"], ["norms", "runs on cpu", "'xla'"]),
        (["--video-fps", "8"], ["--video-fps has no effect", "there is none; leave it out"]),
        (["--interpolation-steps", "2"], ["--interpolation-steps has no effect: no prompt takes over"]),
        (["--image-noise-sigma-min", ".1"], ["--image-noise-sigma-min has no effect", "no input image or video"]),
        (["--negative-prompt", "x", "guidance_scale=1"], ["--negative-prompt has no effect: guidance is off"]),
        (["stage=flow"], ["stage: is of training; run python train.py"]),
        (["interpolate_time=2"], ["interpolate_time has no effect", "prompt_index"]),
        (["--naming", "heliosbench"], ["naming is for a csv of prompts"]),
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
    state = tmp_path / "state"
    command = [sys.executable, "-c", LISTENING, str(config), "--num-frames", "90000", "--state", str(state)]
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
    assert len(frames) == 9 * read_state(state).chunk
    assert f"holds the {len(frames) // 9} of 10000 chunks" in rest


def test_the_sidecar_says_how_the_video_was_made(config, tmp_path):
    assert run(config, "--num-frames", 10, "--seed", 3, "--then", 1, "a blue bar") == 0
    facts = json.loads((tmp_path / "video.json").read_text())
    assert facts["complete"] is True
    assert (facts["frames"], facts["chunks"]) == (10, 2)
    assert facts["settings"]["seed"] == 3
    assert facts["settings"]["switches"][0]["prompt"] == "a blue bar"
    assert len(facts["inputs"]["weights"]) == 64
    assert facts["versions"]["jax"]
    assert "time to first chunk" in facts["figures"]


def test_a_profile_is_of_the_second_chunk(config, tmp_path, capsys):
    assert run(config, "--num-frames", "18", "--profile", str(tmp_path / "trace")) == 0
    (trace,) = (tmp_path / "trace").rglob("*.xplane.pb")
    assert b"PjitFunction(denoise_step)" in trace.read_bytes()
    assert f"profile of chunks in {tmp_path}/trace" in capsys.readouterr().out


def test_frames_and_latents(config, tmp_path, folder):
    assert run(config, "--num-frames", 12, "--out", tmp_path / "x.npz") == 0
    with np.load(tmp_path / "x.npz") as file:
        assert file["latents"].shape == (6, 4, 6, 4)
        assert file["chunk"] == 3
        expected = HeliosPipeline.from_pretrained(folder)(
            "a red plus",
            num_frames=12,
            height=32,
            width=48,
            num_inference_steps=2,
            num_latent_frames_per_chunk=3,
            output_type="latent",
        ).frames[0]
        assert_close(file["latents"], expected)
    assert run(config, "--num-frames", 12, "--out", tmp_path / "frames") == 0
    frames = sorted((tmp_path / "frames").iterdir())
    assert [f.name for f in frames] == [f"{i:06d}.png" for i in range(12)]
    assert Image.open(frames[0]).size == (48, 32)
    assert (tmp_path / "frames.json").exists()


def test_an_image_and_a_video_decide_what_comes(config, tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (50, 40, 3), np.uint8)).save(tmp_path / "i.png")
    with VideoWriter(tmp_path / "v.mp4", 10, 36, 50) as writer:
        writer.write(rng.integers(0, 255, (20, 36, 50, 3), np.uint8))
    made = []
    for i, arguments in enumerate(([], ["--image", tmp_path / "i.png"], ["--video", tmp_path / "v.mp4"])):
        assert run(config, "--num-frames", 9, "--out", tmp_path / f"{i}.npz", *arguments) == 0
        made.append(np.load(tmp_path / f"{i}.npz")["latents"])
    for i in range(3):
        assert np.abs(made[i] - made[i - 1]).max() > 1e-2


class Watched(LatentWriter):
    """Takes its time, and sees which chunk the state on disk is of before and after each chunk that it writes."""

    def __init__(self, path, state):
        super().__init__(path)
        self.state, self.seen = state, []

    def saved(self):
        return read_state(self.state).chunk if self.state.exists() else 0

    def write(self, chunk):
        before = self.saved()
        time.sleep(0.3)
        super().write(chunk)
        self.seen.append((before, self.saved()))


def test_the_state_is_never_ahead_of_the_file(config, tmp_path, monkeypatch):
    writers = []
    monkeypatch.setattr(runs, "_check", lambda *args, **kwargs: None)
    monkeypatch.setattr(
        one_video, "open_writer", lambda path, *_: writers.append(Watched(path, tmp_path / "state")) or writers[-1]
    )
    out = tmp_path / "x.npz"
    assert run(config, "--num-frames", 36, "--state", tmp_path / "state", "--out", out) == 0
    assert writers[0].seen == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert writers[0].saved() == 4


def test_a_slow_writer_does_not_delay_the_stream(config, tmp_path, monkeypatch):
    """The second chunk is there before the first is written."""
    made = threading.Event()

    class Slow(LatentWriter):
        def write(self, chunk):
            assert made.wait(60)
            super().write(chunk)

    class Seen(Stream):
        def __next__(self):
            out = super().__next__()
            if self.chunk == 2:
                made.set()
            return out

    monkeypatch.setattr(one_video, "open_writer", lambda path, *_: Slow(path))
    monkeypatch.setattr(pipeline, "Stream", Seen)
    assert run(config, "--num-frames", 27, "--out", tmp_path / "x.npz") == 0
    assert np.load(tmp_path / "x.npz")["latents"].shape[0] == 9


def test_a_full_disk_ends_the_run_and_what_was_written_stays(config, tmp_path, monkeypatch, capsys):
    class Full(LatentWriter):
        def write(self, chunk):
            if self.frames:
                raise OSError(errno.ENOSPC, "No space left on device")
            super().write(chunk)

    monkeypatch.setattr(one_video, "open_writer", lambda path, *_: Full(path))
    arguments = ["--num-frames", 90, "--state", tmp_path / "state"]
    assert run(config, *arguments, "--out", tmp_path / "x.npz") == 1
    assert np.load(tmp_path / "x.npz")["latents"].shape[0] == 3
    assert read_state(tmp_path / "state").chunk == 1
    printed = capsys.readouterr()
    assert "chunk 2/" not in printed.out
    assert printed.err.count("No space left") == 1


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (MemoryError, "Unable to allocate 3 GiB"),
        (JaxRuntimeError, "RESOURCE_EXHAUSTED: Out of memory allocating 3 bytes."),
    ],
)
def test_no_memory_left_is_one_line_and_what_was_made_stays(kind, text, config, tmp_path, monkeypatch, capsys):
    class Large(Stream):
        def __next__(self):
            if self.chunk:
                raise kind(text)
            return super().__next__()

    monkeypatch.setattr(pipeline, "Stream", Large)
    assert run(config, "--num-frames", 27, "--out", tmp_path / "x.mp4") == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if " by xla " not in line)
    assert text in line
    assert "out of memory: use a smaller height and width, precision=bfloat16" in line
    assert len(read_video(tmp_path / "x.mp4")[0]) == 9
    monkeypatch.setattr(pipeline, "Stream", Stream)
    assert run(config, "--num-frames", 27, "--out", tmp_path / "x.mp4") == 0  # the same command makes the rest


def test_errors_of_other_kinds_stay_whole(config, monkeypatch):
    def broken(*_):
        raise JaxRuntimeError("INTERNAL: a bug")

    monkeypatch.setattr(runs, "run", broken)
    with pytest.raises(JaxRuntimeError, match="INTERNAL"):
        run(config)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--image", "no.png"], ["no.png"]),
        (["--video", "no.mp4"], ["no.mp4"]),
        (["--image", "a.png", "--video", "b.mp4"], ["image and video"]),
        (["--then", "x", "a"], ["--then: chunk must be a whole number"]),
        (["--then", "99", "a blue bar"], ["a blue bar", "past the end"]),
        (["--resume", "no.state"], ["no.state"]),
        (["--format", "png"], ["format is png"]),
        (["ids=[1]"], ["ids", "csv"]),
        (["image_noise_sigma_min=0.9"], ["image_noise_sigma_min"]),
        (["--profile", "trace", "--num-frames", "9"], ["profile", "num_frames 9", "ask for 10"]),
        (["--profile", "trace", "--csv", "x.csv"], ["profile", "csv"]),
        (["--profile", f"{__file__}/x", "--num-frames", "18"], ["cannot be made", "name another folder"]),
        (["--profile", LONG, "--num-frames", "18"], ["cannot be made", "name another folder"]),
        (["--profile", "/proc/x", "--num-frames", "18"], ["/proc/x", "name another folder"]),
        (["--state", f"{__file__}/x"], ["cannot be made", "name another folder"]),
        (["--state", LONG], ["cannot be opened", "name another file"]),
        (["--state", "/proc/x"], ["/proc/x", "name another folder"]),
        (["--out", f"{__file__}/x.mp4"], ["cannot be made", "name another folder"]),
        (["--out", f"{LONG}.mp4"], ["cannot be opened", "name another file"]),
        (["--out", ""], ["--out must name a file"]),
        (["--model", LONG], ["File name too long"]),
        (["--lora", LONG], ["File name too long"]),
        (["--fps", "2147483648"], ["--fps must be at most 2147483647"]),
        (["--height", "9" * 30], ["--height must be at most 16384"]),
        (["--num-inference-steps", "99999999"], ["--num-inference-steps must be at most 10000"]),
        (["--video-fps", "1e300"], ["--video-fps must be at most 1000"]),
        (["--video-fps", "0"], ["--video-fps must be above 0"]),
        (["history_sizes=[9999,2,1]"], ["history_sizes must be at most 1000"]),
    ],
)
def test_bad_tasks_are_one_line(config, arguments, words, capsys, tmp_path):
    assert run(config, *arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(word in error for word in words), error
    assert not list(tmp_path.glob("*.mp4"))


def test_latents_that_are_not_finite_end_the_run(config, tmp_path, capsys, monkeypatch):
    finish = pipeline.SeededNoise.normal
    monkeypatch.setattr(
        pipeline.SeededNoise, "normal", lambda self, site, shape: finish(self, site, shape) * float("nan")
    )
    assert run(config, "--out", tmp_path / "x.mp4", "--num-frames", 9) == 1
    error = capsys.readouterr().err
    (line,) = (line for line in error.splitlines() if " by xla " not in line)  # said once in a process
    assert "chunk 0: latents are NaN or infinite" in line


def test_a_size_that_was_never_trained_warns_once(config, tmp_path, capsys):
    assert run(config, "--num-frames", 9, "--height", 48) == 0
    error = capsys.readouterr().err
    assert error.count("trained at 32 x 48 only") == 1


def test_lora_files_are_merged_in(config, tmp_path, folder, capsys):
    layer = "transformer.blocks.0.attn1.to_q"
    rng = np.random.default_rng(0)
    pair = {f"{layer}.lora_A.weight": (2, 32), f"{layer}.lora_B.weight": (32, 2)}
    save_file({k: rng.standard_normal(s).astype(np.float32) for k, s in pair.items()}, tmp_path / "a.safetensors")
    made = []
    for i, arguments in enumerate(
        ([], ["--lora", f"{tmp_path}/a.safetensors"], ["--lora", f"{tmp_path}/a.safetensors=0"])
    ):
        assert run(config, "--num-frames", 9, "--out", tmp_path / f"{i}.npz", *arguments) == 0
        made.append(np.load(tmp_path / f"{i}.npz")["latents"])
    assert np.abs(made[1] - made[0]).max() > 1e-3
    np.testing.assert_array_equal(made[2], made[0])
    capsys.readouterr()
    for bad, words in ((f"{tmp_path}/a.safetensors=x", "not a number"), (f"{tmp_path}/none", "none")):
        assert run(config, "--lora", bad) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert words in error
