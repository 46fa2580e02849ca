"""100 signals at moments from the start to the end: one line, the documented code, and a file that can go on."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import sample
from helios_jax.media.video import read_video
from tests.fuzz.attempt import Outcome, command, judge
from tests.fuzz.test_fuzz import ROOT, write_config

# SIGINT as a terminal sends it: jobs in the background of a shell inherit an ignored one.
LISTENING = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv[0] = "sample.py"
runpy.run_path({script!r}, run_name="__main__")
"""
PATIENCE = 20  # seconds after a signal: longer is a hang
# Lines that a run prints on stderr whether it is interrupted or not.
USUAL = re.compile(r"(norms|attention) by|failed")
FRAMES = 450  # of a killed run


def start(room: Path, *arguments: str) -> subprocess.Popen:
    """sample.py as a process in the folder `room`."""
    argv = [sys.executable, "-c", LISTENING.format(script=str(ROOT / "sample.py")), *arguments]
    found = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(argv, cwd=room, env=found, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def start_toy(room: Path, kind: str) -> subprocess.Popen:
    """The embedded model makes an mp4, a folder of frames, or three videos of a table in `room`/out."""
    (room / "p.csv").write_text("id,prompt\n" + "".join(f"{i},a red plus moves left\n" for i in range(3)))
    out = {"mp4": ["--out", "out/x.mp4"], "png": ["--out", "out/x"], "csv": ["--out", "out", "--csv", "p.csv"]}[kind]
    model = f"model={ROOT / 'helios_jax/assets/toy'}"
    frames = "33" if kind == "csv" else "132"
    return start(room, str(ROOT / "configs/toy/sample_base.yaml"), model, "--num-frames", frames, *out)


def timed(process: subprocess.Popen) -> float:
    begin = time.monotonic()
    process.communicate()
    assert process.returncode == 0
    return time.monotonic() - begin


@pytest.fixture(scope="session")
def seconds(tmp_path_factory):
    """The seconds that a run of the embedded model takes."""
    return timed(start_toy(tmp_path_factory.mktemp("whole"), "mp4"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", range(40))
def test_a_signal_is_answered(seconds, tmp_path, number, moment):
    dice = random.Random(f"{number} {moment}")
    kind, at = dice.choice(("mp4", "mp4", "png", "csv")), dice.uniform(0.3, seconds)
    process = start_toy(tmp_path, kind)
    time.sleep(at)
    over = process.poll() is not None
    process.send_signal(number)
    hang = ""
    try:
        out, err = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        (out, err), hang = process.communicate(), "hang: no end after a signal"
    about = [line for line in err.splitlines() if line.strip() and not USUAL.search(line)]
    wrong = _wrong(tmp_path / "out", kind, out)
    if process.returncode not in ((0,) if over else (0, 130)):
        wrong.append(f"exit code {process.returncode}")
    if len(about) != (process.returncode == 130):
        wrong.append(f"lines {about}")
    # An interrupt that is answered in one line is a refusal of the rest.
    answered = process.returncode == 130 and not wrong
    judge("signals", Outcome(2 if answered else 0, about, hang), (kind, number.name, round(at, 2)), "; ".join(wrong))


def _wrong(folder: Path, kind: str, out: str) -> list[str]:
    """Everything that is wrong with the files."""
    wrong = [f"left {path}" for path in folder.parent.rglob(".*")]
    videos = sorted(folder.glob("*.mp4")) if kind != "png" else [folder / "x"] if any(folder.glob("x/*.png")) else []
    said = [int(n) for n in re.findall(r"video: \S+ \((\d+) frames", out)]
    if len(videos) > len(said):
        wrong.append(f"{len(videos)} videos, of which {len(said)} were said")
    for path, frames in zip(videos, said):
        there = len(read_video(path)[0]) if frames else 0
        sidecar = path.with_suffix(".json") if kind != "png" else path.with_name(f"{path.name}.json")
        if not frames:
            wrong += [f"{sidecar.name} is of nothing"] if sidecar.exists() else []
            continue
        facts = json.loads(sidecar.read_text())
        if not frames == there == facts.get("frames"):
            wrong.append(f"{path.name}: said {frames}, there {there}, sidecar {facts.get('frames')}")
        if facts["complete"] != (frames == (33 if kind == "csv" else 132)):
            wrong.append(f"{path.name}: complete is {facts['complete']} with {frames} frames")
    return wrong


@pytest.fixture(scope="session")
def whole(assets, tmp_path_factory):
    """The frames of a video that is not killed."""
    room = tmp_path_factory.mktemp("whole")
    write_config(room, assets, out="x.mp4", num_frames=FRAMES)
    timed(start(room, "c.yaml"))
    return read_video(room / "x.mp4")[0].astype(int)


@pytest.mark.parametrize("moment", range(20))
def test_a_killed_run_goes_on(assets, whole, tmp_path, moment, monkeypatch):
    """The same file has all frames in their places at the end, after two kills."""
    write_config(tmp_path, assets, out="x.mp4", num_frames=FRAMES)
    dice = random.Random(moment)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        resume = ["--resume", "s"] if Path("s").exists() else ["--overwrite"] if Path("x.mp4").exists() else []
        last = dice.randint(1, FRAMES // 9)
        with start(tmp_path, "c.yaml", "--state", "s", *resume) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("chunk ") and int(line.split()[1].partition("/")[0]) >= last:
                    break
            time.sleep(dice.uniform(0, 0.03))
            process.kill()
    resume = ["--resume", "s"] if Path("s").exists() else ["--overwrite"]
    outcome = command(sample.main, ["c.yaml", "--state", "s", *resume])
    frames = read_video("x.mp4")[0].astype(int) if Path("x.mp4").exists() else np.zeros((0, 1, 1, 3))
    wrong = "" if len(frames) == len(whole) else f"{len(frames)} frames of {len(whole)}"
    # Frames in a row differ by 56 on average, and one that follows another key frame from itself by up to 12.
    if not wrong and not all(np.abs(a - b).mean() < 25 for a, b in zip(frames, whole)):
        wrong = "other frames"
    judge("kills", outcome, moment, wrong)
