"""Interrupt sample.py at random moments and check what it leaves: python -m tests.stress_interrupts --runs 40

Not one of the tests: a run takes seconds. Each line says when the signal came, the exit code, the lines on stderr that
are about it, and what is wrong with the file, if anything.
"""

import argparse
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from helios_jax.media.video import read_video

ROOT = Path(__file__).parent.parent
PATIENCE = 20  # seconds after a signal: longer is a hang
# SIGINT as a terminal sends it: jobs in the background of a shell inherit an ignored one.
LISTENING = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_path("sample.py", run_name="__main__")
"""
# Lines that a run prints on stderr whether it is interrupted or not.
USUAL = re.compile(r"(norms|attention) by|failed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=float, default=0.3, help="seconds after the start, at least")
    args = parser.parse_args()
    rng, bad, codes, lines = random.Random(args.seed), 0, Counter(), Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "p.csv").write_text("id,prompt\n" + "".join(f"{i},a red plus moves left\n" for i in range(3)))
        begin = time.monotonic()
        _start(folder, "whole").communicate()
        whole = time.monotonic() - begin
        print(f"a whole run: {whole:.1f} s", flush=True)
        for i in range(args.runs):
            kind, number = rng.choice(("mp4", "mp4", "png", "csv")), rng.choice((signal.SIGINT, signal.SIGTERM))
            at = rng.uniform(args.first, whole)
            facts = _one(folder / str(i), folder, kind, number, at)
            bad += bool(facts["wrong"])
            codes[facts["code"]] += 1
            lines[facts["lines"]] += 1
            print(f"{i:3} {kind} {number.name:7} at {at:5.2f} s: {facts}", flush=True)
    print(f"{args.runs} runs, {bad} bad; exit codes {dict(codes)}; lines about it {dict(lines)}")
    return int(bad > 0)


def _start(folder: Path, kind: str) -> subprocess.Popen:
    outs = {"csv": ["--csv", str(folder.parent / "p.csv"), "--out", str(folder), "--num-frames", "33"]}
    path = folder if kind == "png" else folder / "x.mp4"
    command = [sys.executable, "-c", LISTENING, "configs/toy/sample.yaml", "--num-frames", "132"]
    command += outs.get(kind, ["--out", str(path)])
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _one(folder: Path, parent: Path, kind: str, number: signal.Signals, at: float) -> dict:
    process = _start(folder, kind)
    time.sleep(at)
    over = process.poll() is not None
    process.send_signal(number)
    sent = time.monotonic()
    try:
        out, err = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        return {"code": "hang", "lines": 0, "wrong": ["hang"]}
    took = round(time.monotonic() - sent, 2)
    about = [line for line in err.splitlines() if not USUAL.search(line)]
    wrong = _wrong(folder, kind, out)
    if process.returncode != (0 if over or not about else 130):
        wrong.append(f"exit code {process.returncode}")
    if len(about) != (process.returncode == 130):
        wrong.append(about)
    return {"code": process.returncode, "lines": len(about), "took": took, "over": over, "wrong": wrong}


def _wrong(folder: Path, kind: str, out: str) -> list:
    """Everything that is wrong with the files."""
    wrong = [f"left {path}" for path in folder.parent.rglob(".*")]
    videos = sorted(folder.glob("*.mp4")) if kind != "png" else [folder] if any(folder.glob("*.png")) else []
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


if __name__ == "__main__":
    sys.exit(main())
