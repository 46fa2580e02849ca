"""A run that is killed at any moment, also while a checkpoint is written, loses no more than the steps since the last
whole one, and no checkpoint is ever broken. Children of a process that has imported everything are killed: they begin
in a moment. They go on until they are killed, so a slow machine makes the run longer and misses no kill."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import yaml

import helios_jax.training.trainer  # noqa: F401 (train.main would import it in each child)
import train
from tests.processes import environment
from tests.training import dummy  # noqa: F401 (and this)

EVERY, KILLS = 2, 5
ENDLESS = 10**4  # steps: minutes, when nobody comes to kill it
ROOT = Path(__file__).parents[2]


def test_no_moment_to_be_killed_is_a_bad_one(tmp_path):
    config = tmp_path / "c.yaml"
    settings = {"stage": "tests.training.dummy.Dummy", "steps": ENDLESS, "log_every": 1, "data": {"batch_size": 4}}
    settings |= {"checkpoint": {"every": EVERY, "keep": 2}, "optim": {"lr": 1e-2, "ema": {"decay": 0.9}}}
    config.write_text(yaml.safe_dump(settings))
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    seen = tmp_path / "seen.jsonl"
    command = [sys.executable, __file__, str(config), str(killed), str(seen)]
    # A cache of their own: the killed may leave half of what they were writing.
    settings = {**environment(), "DUMMY_SECONDS": "0.01", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "c")}
    told = subprocess.run(command, env=settings, check=True, capture_output=True, text=True)
    *rounds, last = [json.loads(line) for line in seen.read_text().splitlines()]
    assert len(rounds) == KILLS, told.stderr
    assert sum(x["while_saving"] for x in rounds) >= KILLS // 2
    for x in rounds:
        # A save waits for the one before it: when a step is logged, one at most of those before it is not whole.
        assert x["whole"] >= x["logged"] - 2 * EVERY, x
    begun = [x["whole"] for x in rounds]
    assert begun == sorted(begun)
    assert f"resumed at step {begun[-1]} " in told.stdout
    steps = last["steps"]
    assert begun[0] < begun[-1] < steps

    assert train.main([str(config), f"run={whole}", f"steps={steps}"]) == 0
    np.testing.assert_array_equal(np.load(killed / "weight.npy"), np.load(whole / "weight.npy"))
    told_of = [json.loads(line)["step"] for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert told_of == list(range(1, steps + 1))
    kept = {int(p.name) for p in (killed / "checkpoints").iterdir() if p.name.isdigit()}
    assert kept == {steps - EVERY, steps}


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
    """True while a checkpoint is being written."""
    return any("tmp" in path.name for path in (run / "checkpoints").glob("*"))


def wait_until(happened: Callable[[], bool], child: int) -> None:
    while not happened():
        if os.waitpid(child, os.WNOHANG)[0]:
            sys.exit("the run ended by itself")
        time.sleep(1e-4)


def catch(child: int, happened: Callable[[], bool], after: Callable[[], float]) -> None:
    """Stops `child` while something happens, a little after it began: what was over by then is waited for again."""
    while True:
        wait_until(happened, child)
        time.sleep(after())
        os.kill(child, signal.SIGSTOP)
        os.waitpid(child, os.WUNTRACED)
        if happened():
            return
        os.kill(child, signal.SIGCONT)


def main(config: str, run: Path, seen: Path) -> int:
    draw = random.Random(0)
    # A file of its own: what the killed print, half lines among it, ends up in stdout.
    report = seen.open("w", buffering=1)
    for number in range(KILLS):
        child = begin(config, run)
        wanted = logged(run) + draw.randint(2, 4)
        wait_until(lambda wanted=wanted: logged(run) >= wanted, child)
        if number % 2:
            catch(child, lambda: saving(run), lambda: draw.uniform(0, 0.02))
        else:
            time.sleep(draw.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = [int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit()]
        state = {"logged": logged(run), "whole": max(found, default=0), "while_saving": saving(run)}
        print(json.dumps(state), file=report)
    steps = (logged(run) // EVERY + 2) * EVERY
    print(json.dumps({"steps": steps}), file=report)
    return os.waitstatus_to_exitcode(os.waitpid(begin(config, run, f"steps={steps}"), 0)[1])


def begin(config: str, run: Path, *overrides: str) -> int:
    """A child that trains; its process."""
    child = os.fork()
    if child == 0:
        code = train.main([config, f"run={run}", *overrides])
        sys.stdout.flush()
        os._exit(code)
    return child


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], *map(Path, sys.argv[2:])))
