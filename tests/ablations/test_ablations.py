"""Tables, their queue and their page, with commands that take a moment."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from helios_jax.ablations import command, intervals, scores
from helios_jax.ablations.table import Jobs, read
from helios_jax.config import ConfigError
from helios_jax.training.stage_table import load_config
from tests.processes import environment

ROOT = Path(__file__).parents[2]
# A step that trains writes a number; one that scores makes videos with it, whose noise is the seed's.
SCORER = """
import json, sys
import numpy as np
from pathlib import Path
from helios_jax.ablations import scores
model, out, seed = sys.argv[1:]
level = float((Path(model) / "model").read_text())
rng = np.random.default_rng(int(seed))
values = rng.normal(size=8)
videos = [{"id": i, "drift": level + 0.1 * x, "motion": 1.0} for i, x in enumerate(values)]
(Path(out) / "sheet.png").write_bytes(b"png")
scores.write(Path(out), videos, {"drift": [[level, 2 * level]] * 8}, "sheet.png")
"""
TRAINER = """
import sys, time
from pathlib import Path
out, level = sys.argv[1:]
if level == "broken":
    sys.exit("train.py: optim.lr must be positive")
(Path(out) / "model").write_text(level)
(Path(out) / "runs").open("a").write("x")
"""
TABLE = """
title: Anchors
seeds: [0, 1, 2]
variables: {{level: 0, model: "{{train}}"}}
steps:
  train: python {folder}/train.py {{out}} {{level}}
  score: python {folder}/score.py {{model}} {{out}} {{seed}}
rows:
  full: {{}}
  the same: {{level: 0}}
  no anchor: {{level: 3}}
claims:
  - {{says: The anchor keeps colours, metric: drift, row: full, against: [no anchor]}}
  - {{says: Less is more, metric: drift, row: no anchor, against: [full]}}
  - {{says: A copy is better, metric: drift, row: full, against: [the same]}}
  - {{says: It moves, metric: motion, better: higher, row: full, at_most: 2}}
curves: [drift]
"""


@pytest.fixture
def table(tmp_path):
    (tmp_path / "train.py").write_text(TRAINER)
    (tmp_path / "score.py").write_text(SCORER)
    path = tmp_path / "table.yaml"
    path.write_text(TABLE.format(folder=tmp_path))
    return path


def run(table, *arguments) -> int:
    return command.main([str(table), "--out", str(table.parent / "out"), *arguments])


def folders(table, step: str) -> list[Path]:
    return sorted((table.parent / "out").glob(f"{step}-*"))


def test_a_page_says_how_each_claim_came_out(table, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert run(table, "--parallel", "2") == 0
    page = (table.parent / "out" / "page.md").read_text()
    assert "- **Holds**: The anchor keeps colours. drift (lower is better): full" in page
    assert "no anchor 2.9" in page or "no anchor 3" in page
    assert "worse by 3 [3, 3]" in page  # the same videos: no noise in the difference
    assert "- **Does not hold**: Less is more" in page
    assert "- **Open**: A copy is better" in page
    assert "the same\n" in page or "the same." in page
    assert "- **Holds**: It moves" in page
    told = json.loads((table.parent / "out" / "page.json").read_text())
    assert [one["outcome"] for one in told["claims"]] == ["Holds", "Does not hold", "Open", "Holds"]
    assert told["rows"]["no anchor"]["drift"]["value"] == pytest.approx(3, abs=0.2)
    curves = told["curves"]["full"]
    assert list(curves) == ["0", "1", "2"]
    assert {name: len(each) for name, each in curves["0"].items()} == {"drift": len(curves["2"]["drift"])}
    lines = (table.parent / "out" / "page.csv").read_text().splitlines()
    assert len(lines) == 1 + 3 * 3 * 8 * 2
    for name in ("page-curves.png", "page-full.png", "page-no-anchor.png"):
        assert (table.parent / "out" / name).is_file()
        assert name in page


def test_equal_commands_are_one_job_and_done_ones_do_not_run_again(table, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert run(table) == 0
    assert len(folders(table, "train")) == 2  # no seed in its command, and the same level is the same model
    assert len(folders(table, "score")) == 6
    assert run(table, "--seeds", "0") == 0
    assert "Holds for one seed: The anchor keeps colours" in capsys.readouterr().out
    assert run(table, "--seeds", "0", "7", "--rows", "full") == 0
    told = capsys.readouterr().out
    assert "3 jobs, 1 of them to do" in told
    assert "claims are left out, which compare rows that --rows leaves out" in told
    assert "- **Left out**: The anchor keeps colours. Some" in (table.parent / "out" / "page.md").read_text()
    assert [(folder / "runs").read_text() for folder in folders(table, "train")] == ["x", "x"]


def test_scores_that_another_machine_made_need_no_training_here(table, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert run(table, "--seeds", "0", "1") == 0
    for folder in folders(table, "train"):
        shutil.rmtree(folder)  # only the scores were copied
    capsys.readouterr()
    assert run(table, "--seeds", "0", "1", "--list") == 0
    listed = capsys.readouterr().out
    assert (listed.count("not needed: train"), listed.count("done: score")) == (2, 4)
    assert run(table) == 0
    assert "8 jobs, 4 of them to do" in capsys.readouterr().out  # both models again, for the scores of seed 2


def test_a_job_that_fails_is_told_and_the_others_go_on(table, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    text = table.read_text()
    table.write_text(text.replace("no anchor: {level: 3}", "no anchor: {level: broken}"))
    assert run(table, "--seeds", "0") == 1
    err = capsys.readouterr().err
    assert "train of no anchor, seed 0: failed: exit code 1: train.py: optim.lr must be positive" in err
    assert "no result: no anchor, seed 0: it needs train of no anchor, seed 0, which failed" in err
    page = (table.parent / "out" / "page.md").read_text()
    assert "| full |" in page
    assert "no result: no anchor, seed 0" in page
    table.write_text(text)
    assert run(table, "--seeds", "0") == 0


def test_a_seed_that_fails_leaves_the_claims_the_others(table, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    fails = 'if (level, seed) == (3, "2"):\n    sys.exit("no room")\nrng ='
    (table.parent / "score.py").write_text(SCORER.replace("rng =", fails, 1))
    assert run(table) == 1
    assert "no result: no anchor, seed 2: exit code 1: no room" in capsys.readouterr().err
    page = (table.parent / "out" / "page.md").read_text()
    assert "- **Holds for 2 of 3 seeds**: The anchor keeps colours." in page
    assert "worse by 3 [3, 3]" in page
    assert "- **Open**: A copy is better." in page
    assert "| no anchor (2 of 3 seeds) |" in page
    assert "| full |" in page


def test_a_queue_that_is_stopped_or_killed_goes_on(table, tmp_path):
    go = tmp_path / "go"
    (table.parent / "train.py").write_text(
        TRAINER.replace(
            '(Path(out) / "model")',
            "(Path(out) / 'begun').write_text('')\nwhile not Path('GO').exists():\n    time.sleep(0.01)\n"
            '(Path(out) / "model")'.replace("GO", str(go)),
            1,
        )
    )
    arguments = [sys.executable, "-m", "helios_jax.ablations", str(table), "--out", str(table.parent / "out")]
    settings = {**environment(), "PYTHONPATH": str(ROOT)}
    for number, code in ((signal.SIGTERM, 130), (signal.SIGKILL, -9)):
        queue = subprocess.Popen(
            [*arguments, "--seeds", "0"], env=settings, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        while not any((folder / "begun").exists() for folder in folders(table, "train")):
            time.sleep(0.01)
        queue.send_signal(number)
        queue.communicate()
        assert queue.returncode == code
        if number == signal.SIGTERM:
            assert not any((folder / "model").exists() for folder in folders(table, "train"))
            for folder in folders(table, "train"):
                (folder / "begun").unlink()
    with subprocess.Popen([*arguments, "--seeds", "0"], env=settings, stdout=subprocess.PIPE, text=True) as queue:
        # The job of the killed queue lives.
        assert any("goes on with it; waiting for its end" in line for line in queue.stdout)
        go.write_text("")
        queue.stdout.read()
    assert queue.returncode == 0
    # Nobody was there to see that job end well: it ran again, as train.py does with nothing left to do.
    assert sorted((folder / "runs").read_text() for folder in folders(table, "train")) == ["x", "xx"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{{level}}", "{{levle}}", "train: {levle} is no step, no variable, and neither out nor seed; did you mean"),
        ("{{model}}", "{{score}}", "steps: score needs itself"),
        ("level: 0, model: \"{{train}}\"", "level: \"{{model}}\", model: \"{{level}}\"", "stand for one another"),
        ("no anchor: {{level: 3}}", "no anchor: {{lever: 3}}", "'no anchor' sets lever, which is no variable; did"),
        ("against: [no anchor]", "against: [none]", "claims[0] names the row 'none', which is not in rows"),
        ("  score:", "  judge:", "steps must have one named score"),
        ("seeds: [0, 1, 2]", "seeds: [1, 1]", "seeds must be different numbers"),
        ("at_most: 2", "at_least: 2", "at_least"),
        ("title: Anchors", "titel: Anchors", "titel: no such key; did you mean title?"),
        ("steps:", "steps: 3\nother:", "steps must be a group of names with texts, got 3"),
    ],
)  # fmt: skip
def test_tables_that_cannot_be_are_one_line(tmp_path, capsys, old, new, message):
    path = tmp_path / "t.yaml"
    assert old in TABLE
    path.write_text(TABLE.replace(old, new).format(folder=tmp_path))
    assert run(path) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith(f"python -m helios_jax.ablations: {path}: ")
    assert message in err
    assert not (tmp_path / "out").exists()


def test_rows_and_seeds_that_are_not_there_are_refused(table, capsys):
    assert run(table, "--rows", "none") == 2
    assert "'none' is no row of the table; there are full, the same, no anchor" in capsys.readouterr().err
    assert run(table, "--parallel", "0") == 2
    assert run(table, "--parallel", str(len(os.sched_getaffinity(0)) + 1)) == 2
    assert "processors" in capsys.readouterr().err


def test_a_tables_jobs_do_not_depend_on_where_its_folder_is(table):
    there, here = (Jobs(read(table), Path(name))("full", 0) for name in ("/a/b", "c d"))
    assert there.folder.name == here.folder.name
    assert here.command[2] == f"c d/{here.needs[0].folder.name}"  # one argument, whatever is in the path


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ('{"videos": []}', "IndexError"),
        ('{"videos": [{"id": 0, "a": "x"}]}', "could not convert"),
        ('{"videos": [{"id": 0, "a": NaN}]}', "a is not a number for every video"),
        ('{"videos": [{"id": 0, "a": 1}, {"id": 1, "b": 2}]}', "KeyError"),
        ('{"videos": [{"id": 0, "a": 1}], "seconds": {"a": [[1], [2]]}}', "seconds of a"),
        ("{", "JSONDecodeError"),
    ],
)
def test_scores_that_cannot_be_are_one_line(tmp_path, written, message):
    (tmp_path / scores.FILE).write_text(written)
    with pytest.raises(scores.ScoreError, match=message) as caught:
        scores.read(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("count", "effects"),
    [(3, (1, 1, 1)), (3, (0, 1, 1)), (3, (0, 1, 0.3)), (3, (1, 0.3, 0.3)), (10, (1, 1, 1)), (1, (0, 1, 1))],
)
def test_intervals_hold_the_mean_as_often_as_they_say(count, effects):
    """Effects of seeds, of the videos that all seeds make, and of both: the true mean is held in 95 of 100 draws."""
    rng, held = np.random.default_rng(0), 0
    of_seeds, of_videos, rest = effects
    for _ in range(500):
        values = 5 + of_seeds * rng.normal(size=(count, 1)) + of_videos * rng.normal(size=(1, 16))
        found = intervals.mean(values + rest * rng.normal(size=(count, 16)))
        held += found.low <= 5 <= found.high
    assert 0.92 <= held / 500 <= 0.98


def test_values_that_are_the_same_have_no_spread_and_one_value_no_interval():
    assert intervals.mean(np.full((3, 4), 2.0)) == intervals.Mean(2.0, 2.0, 2.0)
    assert intervals.mean(np.full((1, 1), 2.0)) == intervals.Mean(2.0, -math.inf, math.inf)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "ablations").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_tables_are_ones_that_can_be(path, monkeypatch):
    """Also the settings of each run of train.py, and no two runs are the same under different words."""
    monkeypatch.chdir(ROOT)
    table = read(f"ablations/{path.stem}")
    jobs = Jobs(table, Path("out"))
    for row in table.rows:
        jobs(row, 0)
    runs: dict[str, str] = {}
    for job in jobs.in_order:
        if job.command[1] == "train.py":
            config = load_config(job.command[2], job.command[3:])
            settings = str(dataclasses.replace(config, run="any"))
            assert settings not in runs, f"{job.name} is {runs[settings]}"
            runs[settings] = job.name


def test_a_table_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="no such file"):
        read("ablations/quik")
