"""The queue of a table's jobs: its locks, how it stops, and programs that cannot run."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helios_jax.ablations import command, queue
from helios_jax.ablations.table import Job
from tests.processes import ROOT, environment

SCRIPT = """
import signal, sys, time
from pathlib import Path
out = Path(sys.argv[1])
def save(*_):
    time.sleep(0.5)
    (out / "saved").write_text("")
    sys.exit()
signal.signal(signal.SIGTERM, save)
(out / "begun").write_text("")
time.sleep(60)
"""
SCORES = """import json; print(json.dumps({"videos": [{"id": 0, "drift": 1}]}))"""


def write_table(folder: Path, steps: str, rest: str = "rows: {full: {}}\n") -> Path:
    path = folder / "table.yaml"
    path.write_text(f"title: T\nsteps:\n{steps}{rest}")
    return path


def test_a_job_has_its_lock_until_it_is_marked_as_done(tmp_path):
    job = Job("score of full, seed 0", ("true",), tmp_path / "score", ())
    first = queue._start(job, None, set())
    assert first is not None
    first.process.wait()
    assert queue._start(job, None, set()) is None, "a second queue runs it again"
    assert not queue.done(job)
    assert first.end() is None
    assert queue.done(job)
    assert queue._start(job, None, set()) is None
    assert queue.make(job) == 0


def test_a_job_that_failed_may_run_again(tmp_path):
    job = Job("score of full, seed 0", ("false",), tmp_path / "score", ())
    for _ in range(2):
        with pytest.raises(OSError, match="exit code 1"):
            queue.make(job)


def test_a_queue_that_is_stopped_stops_what_its_jobs_have_started(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "train.sh").write_text(f'{shlex.quote(sys.executable)} {tmp_path}/train.py "$1"\necho the end\n')
    table = write_table(tmp_path, f"  score: bash {tmp_path}/train.sh {{out}}\n")
    arguments = [sys.executable, "-m", "helios_jax.ablations", str(table), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(arguments, env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not (begun := [*tmp_path.glob("out/*/begun")]):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 130
    assert (begun[0].parent / "saved").exists()
    assert str(tmp_path) not in subprocess.run(["ps", "ax"], capture_output=True, text=True, check=True).stdout


def test_what_does_not_stop_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(queue, "PATIENCE", 0.5)
    script = f"trap '' TERM; sleep 60 & touch {shlex.quote(str(tmp_path / 'begun'))}; wait; sleep 60"
    job = Job("score of full, seed 0", ("bash", "-c", script), tmp_path / "score", ())
    one = queue._start(job, None, set())
    assert one is not None
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    queue._stop([one])
    assert one.process.wait() == -signal.SIGKILL
    while queue._lives(one.process.pid):  # the signal is sent, and takes a moment
        time.sleep(0.01)


def test_a_program_that_is_not_there_is_refused_before_any_job_runs(tmp_path, capsys):
    table = write_table(tmp_path, "  train: touch {out}/model\n  score: pyhton score.py {train}\n")
    assert command.main([str(table), "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "score of full, seed 0: pyhton is no program that can be run here: install it, or" in err
    assert not [*tmp_path.glob("out/*/model")]


def test_a_job_that_cannot_be_started_leaves_the_others(tmp_path, capsys):
    (tmp_path / "other").write_text("no program")
    os.chmod(tmp_path / "other", 0o755)
    rows = "rows: {full: {}, wrong: {program: FOLDER/other}}"
    rest = f"variables: {{program: bash FOLDER/score.sh}}\n{rows}\n".replace("FOLDER", str(tmp_path))
    table = write_table(tmp_path, "  score: '{program} {out}'\n", rest)
    (tmp_path / "score.sh").write_text(f"{shlex.quote(sys.executable)} -c '{SCORES}' > $1/scores.json\n")
    assert command.main([str(table), "--out", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr()
    assert f"score of wrong, seed 0: {tmp_path}/other cannot be started: Exec format error" in printed.err
    assert "| full | 1 |" in (tmp_path / "out/page.md").read_text()
