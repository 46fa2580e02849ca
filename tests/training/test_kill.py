"""A run that is killed at any moment, also while a checkpoint is written, loses no more than the steps since the last
whole one, and no checkpoint is ever broken. Children of a process that has imported everything are killed: they begin
in a moment."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import yaml

import train

EVERY, STEPS, KILLS = 2, 40, 5
ROOT = Path(__file__).parents[2]


def test_no_moment_to_be_killed_is_a_bad_one(tmp_path):
    config = tmp_path / "c.yaml"
    settings = {"stage": "tests.training.dummy", "steps": STEPS, "log_every": 1, "data": {"batch_size": 4}}
    settings |= {"checkpoint": {"every": EVERY, "keep": 2}, "optim": {"lr": 1e-2, "ema": {"decay": 0.9}}}
    config.write_text(yaml.safe_dump(settings))
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "DUMMY_SECONDS": "0.02"}
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "c"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, __file__, str(config), str(killed)]
    told = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    rounds = [json.loads(line) for line in told.stdout.splitlines() if line.startswith("{")]
    assert len(rounds) == KILLS, told.stderr
    assert sum(x["while_saving"] for x in rounds) >= 2
    for x in rounds:
        # A save waits for the one before it: when a step is logged, one at most of those before it is not whole.
        assert x["whole"] >= x["logged"] - 2 * EVERY, x
    begun = [x["whole"] for x in rounds]
    assert begun == sorted(begun)
    assert f"resumed at step {begun[-1]} " in told.stdout
    assert begun[0] < begun[-1] < STEPS

    assert train.main([str(config), f"run={whole}"]) == 0
    np.testing.assert_array_equal(np.load(killed / "weight.npy"), np.load(whole / "weight.npy"))
    steps = [json.loads(line)["step"] for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))
    assert sorted(p.name for p in (killed / "checkpoints").iterdir() if p.name.isdigit()) == ["38", "40"]


def logged(run: Path) -> int:
    """The last step whose metrics are on disk."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    for line in reversed(lines):
        try:
            return json.loads(line)["step"]
        except ValueError:
            continue  # half a line
    return 0


def saving(run: Path) -> bool:
    """Whether a checkpoint is being written."""
    return any("tmp" in path.name for path in (run / "checkpoints").glob("*"))


def main(config: str, run: Path) -> int:
    draw = random.Random(0)
    for number in range(KILLS + 1):
        child = os.fork()
        if child == 0:
            code = train.main([config, f"run={run}"])
            sys.stdout.flush()
            os._exit(code)
        if number == KILLS:
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        wanted = logged(run) + draw.randint(2, 4)
        while logged(run) < wanted:
            time.sleep(1e-3)
        if number % 2:
            while not saving(run):
                pass
            time.sleep(draw.uniform(0, 0.03))
        else:
            time.sleep(draw.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = [int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit()]
        state = {"logged": logged(run), "whole": max(found, default=0), "while_saving": saving(run)}
        print(json.dumps(state), flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
