"""100 signals at moments from the start to the end: one line, the documented code, and a file that can go on."""

import contextlib
import json
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
from tests.fuzz.attempt import Outcome, judge
from tests.fuzz.test_fuzz import ROOT, command, write_config

# Ctrl-C works in it: a job in the background of a shell ignores SIGINT, and so do its children.
LISTENING = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv[0] = "sample.py"
runpy.run_path({script!r}, run_name="__main__")
"""
FRAMES = 450
LIMIT = 60  # seconds from a signal to the end


def start(room: Path, *arguments: str) -> subprocess.Popen:
    code = LISTENING.format(script=str(ROOT / "sample.py"))
    argv = [sys.executable, "-c", code, "c.yaml", "--num-frames", str(FRAMES), *arguments]
    return subprocess.Popen(argv, cwd=room, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="session")
def whole(assets, tmp_path_factory):
    """(the frames of the video that is not interrupted, the seconds that it takes)."""
    room = tmp_path_factory.mktemp("whole")
    write_config(room, assets, out="x.mp4")
    begin = time.monotonic()
    with start(room) as process:
        process.communicate()
    assert process.returncode == 0
    return read_video(room / "x.mp4")[0].astype(int), time.monotonic() - begin


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", range(40))
def test_a_signal_is_answered(assets, whole, tmp_path, number, moment):
    write_config(tmp_path, assets, out="x.mp4")
    after = random.Random(f"{number} {moment}").uniform(0.3, whole[1])
    begin = time.monotonic()
    with start(tmp_path, "--state", "s") as process:
        time.sleep(after)
        process.send_signal(number)
        try:
            out, err = process.communicate(timeout=LIMIT)
            hang = ""
        except subprocess.TimeoutExpired:
            process.kill()
            (out, err), hang = process.communicate(), "hang: no end after a signal"
    lines = [line for line in err.splitlines() if line.strip()]
    code = process.returncode
    wrong = ""
    if code == 130:
        said = re.search(r"x\.mp4 \((\d+) frames", out)
        frames = len(read_video(tmp_path / "x.mp4")[0]) if (tmp_path / "x.mp4").exists() else 0
        if said and int(said[1]) != frames:
            wrong = f"{frames} frames, not {said[1]}"
        if "Traceback" in err or "Exception ignored" in err:
            hang = err
        # An interrupted run is a right answer, as a refusal is.
        outcome = Outcome(2 if not wrong else 0, lines[-1:] or ["interrupted"], hang)
    else:
        done = (tmp_path / "x.json").exists() and json.loads((tmp_path / "x.json").read_text()).get("complete")
        wrong = "" if code == 0 and done else f"code {code} after {time.monotonic() - begin:.1f} s"
        outcome = Outcome(0, lines, hang)
    judge("signals", outcome, (number.name, round(after, 2), err[-2000:]), wrong)


@pytest.mark.parametrize("moment", range(20))
def test_a_killed_run_goes_on(assets, whole, tmp_path, moment, monkeypatch):
    """The same file has all frames in their places at the end, after two kills."""
    write_config(tmp_path, assets, out="x.mp4")
    dice = random.Random(moment)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        resume = ["--resume", "s"] if Path("s").exists() else ["--overwrite"] if Path("x.mp4").exists() else []
        with start(tmp_path, "--state", "s", *resume) as process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=dice.uniform(0.3, 1.1) * whole[1])
            process.kill()
    resume = ["--resume", "s"] if Path("s").exists() else ["--overwrite"]
    outcome = command(sample.main, ["c.yaml", "--num-frames", FRAMES, "--state", "s", *resume])
    frames = read_video("x.mp4")[0].astype(int) if Path("x.mp4").exists() else np.zeros((0, 1, 1, 3))
    wrong = "" if len(frames) == len(whole[0]) else f"{len(frames)} frames of {len(whole[0])}"
    if not wrong and not all(np.abs(a - b).mean() < 12 for a, b in zip(frames, whole[0])):
        wrong = "other frames"
    judge("kills", outcome, moment, wrong)
