"""Runs of several hosts: the same losses as one, and one end for all of them, by one line, whatever happens to one."""

import json
import resource
import shutil
import signal
import time
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
import yaml

from helios_jax.config import ConfigError
from helios_jax.data import records
from helios_jax.data.records import EMPTY_TEXT
from helios_jax.media.video import read_video
from helios_jax.runtime import host_watch
from helios_jax.runtime import hosts as agreement
from helios_jax.training import trainer
from helios_jax.training.cli import main
from helios_jax.training.run_config import TrainConfig
from helios_jax.training.trainer import check_hosts
from tests.several_hosts import Host, Hosts
from tests.training.test_ends import largest

CONFIG = {
    "stage": "tests.training.dummy.Loaded",
    "steps": 8,
    "log_every": 1,
    "precision": "float32",
    "data": {"batch_size": 8},
    "optim": {"lr": 1e-2, "ema": {"decay": 0.9}},
    "checkpoint": {"every": 4, "keep": 2},
}
ENDLESS = "steps=100000"
# Of two devices on each axis: a sum of four may be taken in another order by other hosts.
EXACT = ["mesh.data=2", "mesh.tensor=2"]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    started = Hosts(tmp_path_factory.mktemp("hosts"))
    yield started
    started.close()


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return str(path)


@pytest.fixture(scope="module")
def trained(hosts, tmp_path_factory):
    """The run of CONFIG to its end, on one host with four devices."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    hosts.run([str(folder / "c.yaml"), f"run={folder / 'r'}"], hosts=1, devices=4)
    return folder / "r"


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def wait_for(run: Path, step: int) -> None:
    """Returns when the run has logged `step`."""
    path, until = run / "metrics.jsonl", time.monotonic() + 120
    while not path.exists() or len(path.read_text().splitlines()) < step:
        assert time.monotonic() < until, "the run does not begin"
        time.sleep(0.02)


def last_line(host: Host) -> str:
    """The one line of train.py's own that a host ended with; what the stage logs is no such line."""

    def lines() -> list[str]:
        own = (line for line in host.said.splitlines() if line.startswith("train.py: "))
        return [line for line in own if not line.endswith(" 64 records")]

    until = time.monotonic() + 10  # a shell may say it, after the process is gone
    while not (told := lines()):
        assert time.monotonic() < until, host.said
        time.sleep(0.05)
    assert len(told) == 1, host.said
    assert "Traceback" not in host.said or "Gloo" in host.said, host.said
    return told[0].removeprefix("train.py: ")


def test_losses_are_those_of_one_host_bit_for_bit(hosts, config, trained, tmp_path):
    """On one mesh; of four hosts, two share each sample. Validations in between are the same, too."""
    runs = [tmp_path / str(number) for number in (1, 2, 4)]
    validation = "validation={every: 3, prompts: [x]}"
    for number, run in zip((1, 2, 4), runs):
        started = hosts.run([config, f"run={run}", validation, *EXACT], hosts=number, devices=4 // number)
        for host in started:
            assert [line for line in host.said.splitlines() if "64 records" in line] == ["train.py: 64 records"]
    one, two, four = map(losses, runs)
    assert one == two == four
    np.testing.assert_allclose(one, losses(trained), rtol=1e-5)
    for name in ("weight.npy", "validation/step_000003/weight.npy", "validation/step_000006/weight.npy"):
        weights = [np.load(run / name) for run in runs]
        np.testing.assert_array_equal(weights[1:], weights[:1] * 2)


@pytest.mark.heavy
def test_hosts_make_the_validation_videos_of_one(hosts, folder, tmp_path):
    """The transformer itself, split over the hosts; the first writes. The last bits of sums may differ."""
    rng, shapes = np.random.default_rng(0), {"latents": (3, 9, 4, 6, 4), "text": (16, 16)}
    features = {name: records.tensor(shape, np.float16) for name, shape in shapes.items()}
    clips = [{name: rng.standard_normal(shape).astype(np.float16) for name, shape in shapes.items()} for _ in range(6)]
    records.write(tmp_path / "latents", features, {"train": clips})
    np.save(tmp_path / "latents" / EMPTY_TEXT, np.zeros((16, 16), np.float16))
    validation = {"every": 1, "prompts": ["a", "b"], "num_frames": 34, "height": 32, "width": 48}
    settings = {
        **{**CONFIG, "stage": "flow", "steps": 1, "init": str(folder), "flow": {"components": str(folder)}},
        "data": {"folder": str(tmp_path / "latents"), "batch_size": 4},
        "validation": {**validation, "num_inference_steps": 1},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    videos = []
    for number in (1, 2):
        run = tmp_path / str(number)
        mesh = ["mesh.data=2", "mesh.fsdp=2"]
        hosts.run([str(tmp_path / "c.yaml"), f"run={run}", *mesh], hosts=number, devices=4 // number)
        made = sorted((run / "validation" / "step_000001").iterdir())
        assert [path.name for path in made] == ["0.mp4", "1.mp4"]
        videos.append([read_video(path)[0].astype(int) for path in made])
    assert np.shape(videos) == (2, 2, 34, 32, 48, 3)
    one, two = np.array(videos)
    assert np.abs(one - two).mean() < 0.5 < np.abs(one[0] - one[1]).mean()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "mesh"),
    [
        (2, ["mesh.data=1", "mesh.tensor=4"]),
        pytest.param(4, ["mesh.data=2", "mesh.fsdp=2"], marks=pytest.mark.heavy),
    ],
    ids=["samples across hosts", "weights across hosts"],
)
def test_losses_are_those_of_one_host_on_any_mesh(hosts, config, trained, tmp_path, number, mesh):
    hosts.run([config, f"run={tmp_path / 'r'}", *mesh], hosts=number, devices=4 // number)
    np.testing.assert_allclose(losses(tmp_path / "r"), losses(trained), rtol=1e-5)
    np.testing.assert_allclose(np.load(tmp_path / "r" / "weight.npy"), np.load(trained / "weight.npy"), atol=1e-5)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), pytest.param(signal.SIGINT, 130, marks=pytest.mark.heavy)]
)
def test_a_signal_to_one_host_saves_and_ends_all_and_others_go_on(hosts, config, tmp_path, number, code):
    """Slurm says how many there are, and tells a stopped run from one that is done by its exit code."""
    run = tmp_path / "r"
    started = hosts.start([config, f"run={run}", ENDLESS, "checkpoint.every=100000", *EXACT], slurm=True)
    wait_for(run, 3)
    started[1].kill(number)
    assert hosts.wait(started) == [code, code]
    (told,) = [line for line in started[0].said.splitlines() if line.startswith(number.name)]
    step = int(told.split("saved step ")[1].split()[0])
    assert [path.name for path in (run / "checkpoints").iterdir()] == [str(step)]
    assert len(losses(run)) == step
    assert not (run / "weight.npy").exists(), "a half-trained model was exported"

    more = f"steps={step + 3}"
    goes_on = hosts.run([config, f"run={run}", more, *EXACT], hosts=1, devices=4)
    assert f"resumed at step {step} " in goes_on[0].said
    hosts.run([config, f"run={tmp_path / 'whole'}", more, *EXACT], hosts=1, devices=4)
    assert losses(run) == losses(tmp_path / "whole")
    np.testing.assert_array_equal(np.load(run / "weight.npy"), np.load(tmp_path / "whole" / "weight.npy"))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_host_that_is_killed_ends_the_others_by_one_line(hosts, config, tmp_path, victim):
    """And the run goes on after the worst of losses, that of the first host."""
    run = tmp_path / "r"
    started = hosts.start([config, f"run={run}", ENDLESS, *EXACT])
    wait_for(run, 9)
    started[victim].kill(signal.SIGKILL)
    codes = hosts.wait(started)
    assert codes[victim] == -signal.SIGKILL
    left = started[1 - victim]
    # jax itself aborts a process that loses the first host, which keeps the store.
    assert codes[1 - victim] in ([76] if victim else [76, -signal.SIGABRT]), left.said
    lost, _, remedy = last_line(left).partition("; ")
    assert lost == f"host {victim} is gone" or (victim == 0 and lost == "this host was killed or has lost host 0")
    assert remedy == "the same command on all hosts goes on from the newest checkpoint"
    if victim:
        return
    step = max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdecimal())
    (first, *_) = hosts.run([config, f"run={run}", f"steps={step + 2}", *EXACT])
    assert f"resumed at step {step} " in first.said
    hosts.run([config, f"run={tmp_path / 'whole'}", f"steps={step + 2}", *EXACT], hosts=1, devices=4)
    assert losses(run) == losses(tmp_path / "whole")


@pytest.mark.slow
def test_a_damaged_record_of_one_host_ends_all_by_its_line(hosts, config, tmp_path):
    started = hosts.start([config, f"run={tmp_path / 'r'}"], environments={1: {"DUMMY_DAMAGED": "5"}})
    assert hosts.wait(started) == [1, 1]
    line = last_line(started[1])
    assert "data/x[train]: record 5: it is odd, or leave it out with data.leave_out=[5]" in line
    assert last_line(started[0]) == f"host 1: {line}"


@pytest.mark.slow
def test_a_disk_that_is_full_on_one_host_ends_all_by_its_line(hosts, config, tmp_path):
    run = tmp_path / "r"
    started = hosts.start([config, f"run={run}", ENDLESS, "mesh.data=1", "mesh.fsdp=4"])
    wait_for(run, 9)
    resource.prlimit(started[1].pid, resource.RLIMIT_FSIZE, (4000, 4000))
    assert hosts.wait(started) == [1, 1], started[0].said + started[1].said
    line = last_line(started[1])
    assert "checkpoints cannot be written: File too large; free space there" in line
    assert last_line(started[0]) == f"host 1: {line}"
    step = max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdecimal())
    assert f"step {step} in {run / 'checkpoints'} is whole, the same command goes on from it" in line
    (first,) = hosts.run([config, f"run={run}", f"steps={step + 2}", "mesh.data=1", "mesh.fsdp=4"], hosts=1, devices=4)
    assert f"resumed at step {step} " in first.said


@pytest.mark.slow
def test_a_checkpoint_that_one_host_cannot_read_is_set_aside_by_all(hosts, config, trained, tmp_path):
    run = tmp_path / "r"
    shutil.copytree(trained, run)
    file = largest(run / "checkpoints" / "8")
    file.write_bytes(file.read_bytes()[:100])
    first, second = hosts.run([config, f"run={run}", "steps=10", "mesh.data=1", "mesh.fsdp=4"])
    assert "8.damaged, and the run goes on from step 4" in first.said + second.said
    assert "resumed at step 4 " in first.said
    np.testing.assert_allclose(losses(run)[:8], losses(trained), rtol=1e-5)


def test_a_host_that_never_comes_ends_the_others_by_one_line(hosts, config, tmp_path):
    """Host 2 ends with an error of its own before it joins. Host 0 gives up first; host 1 must not fall over that."""
    (tmp_path / "empty").mkdir()
    folders = [tmp_path, tmp_path, tmp_path / "empty"]
    within = {host: {"JOIN_WITHIN": seconds} for host, seconds in enumerate(("2", "4", "4"))}
    started = hosts.start(["c.yaml", "run=r"], hosts=3, devices=1, folders=folders, environments=within)
    assert hosts.wait(started) == [2, 2, 2]
    remedy = "look for a host that ended with an error or was not started, then start all again\n"
    first, second, third = (host.said for host in started)
    assert first == f"train.py: cannot join 3 hosts: not all came within 2 s; {remedy}"
    begin, _, rest = second.partition("127.0.0.1:")
    assert begin == "train.py: cannot join 3 hosts: host 0 does not answer at "
    assert rest.partition(" ")[2] == f"within 4 s; {remedy}"
    assert "c.yaml" in third
    assert third.count("\n") == 1


@pytest.mark.slow
def test_hosts_with_other_settings_or_folders_are_refused(hosts, config, tmp_path):
    """Of the hosts' relative folders only the names are the same."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    started = hosts.start([config, "run=r"], folders=folders)
    assert hosts.wait(started) == [2, 2]
    for host in started:  # both find it; one may be the first to say so
        line = last_line(host).removeprefix("host 0: ").removeprefix("host 1: ")
        assert line.startswith("run: r is another folder on host 1 than on host 0; name one on a file ")
    assert [list(folder.iterdir()) for folder in folders] == [[], []]

    lost = {0: {"JAX_PROCESS_ID": "1"}}
    alone = hosts.start([config, f"run={tmp_path / 'r'}"], hosts=1, environments=lost, slurm=True)
    assert hosts.wait(alone) == [2]
    assert last_line(alone[0]).endswith("no cluster says how many hosts there are: set mesh.processes")

    other = tmp_path / "b" / "c.yaml"
    other.write_text(yaml.safe_dump({**CONFIG, "seed": 5}))
    shutil.copy(config, tmp_path / "a" / "c.yaml")
    started = hosts.start(["c.yaml", f"run={tmp_path / 'r'}"], folders=folders)
    assert hosts.wait(started) == [2, 2]
    told = "all hosts must have the same settings as host 0; seed was 0, is 5 here; give all the same command"
    assert last_line(started[1]) == told
    assert last_line(started[0]) == f"host 1: {told}"


@pytest.mark.parametrize("several", [True, False])
def test_hosts_find_compiled_programs_in_one_folder(config, tmp_path, monkeypatch, several):
    """The first alone writes them: in the homes of the others there would be none after a restart."""
    told = {}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setattr(jax.config, "update", lambda name, value: told.update({name: value}))
    monkeypatch.setattr(agreement, "join", lambda processes: None)
    monkeypatch.setattr(agreement, "several", lambda: several)
    monkeypatch.setattr(host_watch, "Watch", mock.Mock())
    monkeypatch.setattr(trainer, "train", lambda *of: 0)
    assert main([config, f"run={tmp_path / 'runs' / 'r'}"]) == 0
    assert (told["jax_compilation_cache_dir"] == str(tmp_path / "runs" / "xla")) == several


def test_a_host_of_a_pod_that_was_not_joined_is_refused(monkeypatch):
    """The runtime of a TPU pod counts its hosts by itself, where the config says that there is one."""
    monkeypatch.setattr(jax, "process_count", lambda: 16)
    with pytest.raises(ConfigError, match=r"this is one of 16 hosts; set mesh\.processes=null"):
        check_hosts(TrainConfig())
