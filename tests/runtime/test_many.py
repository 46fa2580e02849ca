"""Many tasks on a Ray cluster of two workers: the results of one process, whatever dies, fails or was done before."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from helios_jax import locations
from helios_jax.ablations import command as ablations
from helios_jax.media.mp4 import VideoWriter
from helios_jax.media.writers import read_sidecar
from helios_jax.precompute import cli as precompute
from helios_jax.runtime import many
from tests.ablations import test_ablations
from tests.data.test_shards import content
from tests.many_tasks import Item, die, done, refuse, start
from tests.processes import environment
from tests.tiny_run import run

cluster_utils = pytest.importorskip("ray.cluster_utils", reason="the `ray` extra is not installed")
ROOT = Path(__file__).parents[2]
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}  # nothing is sent, or written to the home folder
MARK = "HELIOS_TEST_CLUSTER"  # a variable of the environment of the cluster's processes
DRIVER = """
import sys
from pathlib import Path
from helios_jax.runtime import interrupts
interrupts.install("driver")
from helios_jax.runtime import many
from tests.many_tasks import Item, start
items = [Item("first", "", Path(sys.argv[2])), *[Item(f"long {i}", "wait", Path(sys.argv[2])) for i in range(2)]]
try:
    for result in many.run(items, start, cluster=many.cluster(sys.argv[1], None)):
        print(result.value, flush=True)
except KeyboardInterrupt:
    interrupts.leave(interrupts.EXIT_CODE)
"""


@pytest.fixture(scope="module")
def address(compilation):
    """The address of a cluster with two CPUs."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**environment(), **QUIET, MARK: str(os.getpid())}.items():
            patch.setenv(name, value)
        sizes = {"num_cpus": 2, "object_store_memory": 80 * 2**20, "include_dashboard": False}
        cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=sizes)
        yield cluster.address
        cluster.shutdown()


def workers(call: str) -> list[int]:
    """Process ids of the cluster's workers that run a method."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            title, variables = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
        except OSError:  # it has ended
            continue
        if title.startswith(f"ray::_Worker.{call}".encode()) and f"{MARK}={os.getpid()}\0".encode() in variables:
            found.append(int(process.name))
    return found


def test_deaths_are_tried_again_and_errors_are_results(address, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(many, "RETRIES", 1)
    fates = {"a": "", "b": "bad", "c": "", "h": "", "d": "buggy", "e": "deadly once", "f": "deadly", "g": ""}
    items = [Item(name, fate, tmp_path) for name, fate in fates.items()]
    (tmp_path / "g").write_text("")
    cluster = many.cluster(address, "CPU=1")
    results = list(many.run(items, start, done=done, cluster=cluster, shared=[tmp_path]))
    printed = capsys.readouterr()
    assert sorted(result.task.name for result in results) == list("abcdefh")
    values = {r.task.name: r.value for r in results if r.error is None}
    assert set(values) == set("aceh")
    assert max(values[name] for name in "ach") > 1  # one of the two workers made two of these three
    errors = {r.task.name: r.error for r in results if r.error is not None}
    assert errors["b"] == "b is bad: it cannot be"
    assert errors["d"] == "KeyError: 'd'"
    assert errors["f"].startswith("its worker died 2 times: ")
    tries = {name: len((tmp_path / f"{name}.tries").read_text()) for name in "abcdefh"}
    assert tries == {"a": 1, "b": 1, "c": 1, "h": 1, "d": 1, "e": 2, "f": 2}
    assert "again: e: its worker on" in printed.err
    assert printed.err.count("failed: ") == 3
    assert printed.err.count("Traceback") == 1
    assert "7 tasks, room for 2 workers with CPU=1 each" in printed.out
    (last,) = [line for line in printed.out.splitlines() if line.startswith("7/7 ")]
    assert last.endswith("about 0:00:00 left")
    assert not [*tmp_path.glob(".probe*")]


def test_here_they_are_made_in_turn(tmp_path, capsys):
    items = [Item(name, fate, tmp_path) for name, fate in {"a": "", "b": "bad", "c": "", "d": ""}.items()]
    (tmp_path / "c").write_text("")
    results = list(many.run(items, start, done=done))
    assert [(r.task.name, r.value, r.error) for r in results] == [
        ("a", 1, None), ("b", None, "b is bad: it cannot be"), ("d", 3, None),
    ]  # fmt: skip
    assert capsys.readouterr().err == "failed: b: b is bad: it cannot be\n"
    assert list(many.run([], refuse)) == []  # nothing is prepared for nothing


def test_what_no_worker_can_do_ends_the_run_by_one_line(address, tmp_path, monkeypatch):
    monkeypatch.setattr(many, "RETRIES", 0)
    item = Item("a", "", tmp_path)
    for begin, worker, message in (
        (refuse, None, r"no folder x \(on "),
        (die, None, "1 workers in a row died before they were ready: "),
        (start, "CPU=3", "--ray-worker is CPU=3: no machine of the cluster has as much; they have CPU=2,"),
    ):
        with pytest.raises(many.ClusterError, match=message):
            list(many.run([item], begin, cluster=many.cluster(address, worker)))
    assert not done(item)


def test_a_worker_that_sees_another_folder_refuses(tmp_path, monkeypatch):
    monkeypatch.setattr(locations, "VISIBLE", 0.0)
    monkeypatch.chdir(tmp_path)
    with many._probes([tmp_path / "out"]) as probes:
        assert many._Worker().begin(start, "/", probes)[1] is None
        for name in probes:
            Path(name).write_text("another machine's")
        node, refusal = many._Worker().begin(refuse, "/nowhere", probes)
    assert refusal is not None
    assert refusal.startswith(
        f"{tmp_path / 'out'} is another folder on {node} than where the run was started: name one"
    )
    assert [*(tmp_path / "out").iterdir()] == []


@pytest.mark.parametrize(
    ("ray", "worker", "message"),
    [
        ("127.0.0.1:1", None, "--ray 127.0.0.1:1: there is no cluster that can be used: .*refused"),
        ("no address", None, "--ray no address: there is no cluster that can be used: "),
        ("auto", "GPU", "--ray-worker is 'GPU': it must read NAME=NUMBER"),
        ("auto", "GPU=0", "--ray-worker is 'GPU=0': it must read NAME=NUMBER"),
        (None, "GPU=1", "give --ray, too"),
    ],
)
def test_a_bad_address_or_worker_is_one_line(ray, worker, message, tmp_path):
    with pytest.raises(many.ClusterError, match=message):
        list(many.run([Item("a", "", tmp_path)], start, cluster=many.cluster(ray, worker)))


def test_without_ray_its_option_says_what_to_install(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(many.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "p.txt").write_text("a red plus\n")
    assert run(config, "--csv", tmp_path / "p.txt", "--out", tmp_path / "all", "--ray", "auto") == 2
    assert 'pip install "helios_jax[ray]", or leave --ray out' in capsys.readouterr().err
    assert run(config, "--ray", "auto") == 2
    assert "give csv, or leave ray out" in capsys.readouterr().err


def test_a_signal_cancels_what_runs_and_leaves_what_is_made(address, tmp_path):
    command = [sys.executable, "-c", DRIVER, address, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while len([*tmp_path.glob("long*.tries")]) < 2:
            assert process.poll() is None
            time.sleep(0.05)
        assert len(workers("make")) == 2
        process.send_signal(signal.SIGTERM)
        printed, error = process.communicate(timeout=30)
        assert process.returncode == 130
    assert error == "driver: interrupted by SIGTERM\n"
    assert "1/3 first on" in printed
    until = time.monotonic() + 10
    while workers("make") and time.monotonic() < until:
        time.sleep(0.05)
    assert workers("make") == []
    assert (tmp_path / "first").exists()


def kill_one(out: Path) -> None:
    """Kills a worker that has begun a video."""
    while not any((read_sidecar(path) or {}).get("complete") is False for path in out.glob("*.mp4")):
        time.sleep(0.02)
    os.kill(workers("make")[0], signal.SIGKILL)


def test_videos_are_those_of_one_process_though_a_worker_is_killed(address, config, tmp_path, capsys):
    (tmp_path / "p.csv").write_text("id,prompt,image\n1,a red plus,\n2,a blue bar,missing.png\n3,a bar,\n")
    arguments = [config, "--csv", tmp_path / "p.csv", "--num-frames", 18]
    assert run(*arguments, "--out", tmp_path / "here") == 1
    here = {path.name: path.read_bytes() for path in (tmp_path / "here").glob("*.mp4")}
    assert set(here) == {"1.mp4", "3.mp4"}
    capsys.readouterr()
    killer = threading.Thread(target=kill_one, args=[tmp_path / "there"], daemon=True)
    killer.start()
    assert run(*arguments, "--out", tmp_path / "there", "--ray", address) == 1
    printed = capsys.readouterr()
    assert "its worker on" in printed.err
    assert "failed: id 2:" in printed.err
    assert "missing.png: no such file" in printed.err
    assert "1 of 3 videos failed; the same command tries them again" in printed.err
    assert {path.name: path.read_bytes() for path in (tmp_path / "there").glob("*.mp4")} == here
    settings = [json.loads((tmp_path / out / "1.json").read_text())["settings"] for out in ("here", "there")]
    assert settings[0] == settings[1]
    (tmp_path / "p.csv").write_text("id,prompt\n1,a red plus\n2,a blue bar\n3,a bar\n")
    assert run(*arguments, "--out", tmp_path / "there") == 0  # goes on with what the cluster left
    assert "3 videos, 2 of them done before" in capsys.readouterr().out
    assert (tmp_path / "there" / "2.mp4").exists()
    assert run(*arguments, "--out", tmp_path / "there", "--ray", "nowhere") == 0  # nothing is left for a cluster


def test_a_dataset_is_that_of_one_process_and_done_shards_are_kept(address, folder, tmp_path, capsys):
    rng, entries = np.random.default_rng(0), []
    for i in range(3):
        with VideoWriter(tmp_path / f"{i}.mp4", 24, 16, 32) as video:
            video.write(rng.integers(0, 256, (10, 16, 32, 3)).astype(np.uint8))
        entries.append({"path": f"{i}.mp4", "cut": [0, 10], "crop": [0, 32, 0, 16], "cap": [f"a red {i}"]})
    (tmp_path / "2.mp4").unlink()
    (tmp_path / "list.json").write_text(json.dumps(entries))
    sizes = ["--size", "16x32", "--chunk-frames", "9", "--min-frames", "9", "--shard-size", "1"]
    arguments = ["clips", "--json", f"{tmp_path}/list.json", "--model", str(folder), *sizes]
    assert precompute.main([*arguments, "--out", f"{tmp_path}/here/data"]) == 0
    begun = [*arguments, "--out", f"{tmp_path}/there/data"]
    assert precompute.main([*begun, "--shard", "0/3"]) == 0
    capsys.readouterr()
    assert precompute.main([*begun, "--ray", address, "--ray-worker", "CPU=2"]) == 0
    printed = capsys.readouterr()
    assert "1 of 3 shards are done" in printed.out
    assert "2 tasks, room for 1 workers with CPU=2 each" in printed.out
    assert "skipped 2_0-10:" in printed.err
    assert content(tmp_path / "there" / "data") == content(tmp_path / "here" / "data")


def test_the_jobs_of_a_table_each_run_once_after_those_that_they_need(address, tmp_path, capsys):
    (tmp_path / "train.py").write_text(test_ablations.TRAINER)
    (tmp_path / "score.py").write_text(test_ablations.SCORER)
    text = test_ablations.TABLE.format(folder=tmp_path).replace("curves: [drift]", "")
    (tmp_path / "table.yaml").write_text(text.replace("level: 3", "level: broken"))
    arguments = [f"{tmp_path}/table.yaml", "--out", f"{tmp_path}/out", "--seeds", "0", "--ray", address]
    assert ablations.main(arguments) == 1
    printed = capsys.readouterr()
    assert "4 jobs, 4 of them to do\n2 tasks, room for 2 workers" in printed.out
    assert "failed: train of no anchor, seed 0: exit code 1: train.py: optim.lr must be positive" in printed.err
    assert "no result: no anchor, seed 0: it needs train of no anchor" in printed.err
    assert [path.read_text() for path in (tmp_path / "out").glob("train-*/runs")] == ["x"]
    assert len([*(tmp_path / "out").glob("score-*/done.json")]) == 1
