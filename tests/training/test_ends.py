"""How runs end that cannot go on: damaged checkpoints and records, full disks, folders that cannot be written."""

import contextlib
import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import orbax.checkpoint as ocp
import pytest
import yaml

from helios_jax.data.records import RecordError
from helios_jax.training import errors, progress
from helios_jax.training.run_checkpoints import Checkpoints
from tests.training import dummy
from tests.training.test_loop import BASE, lines, newest, run

# Orbax's threads tell a closed event loop of the files that cannot be written; `cli.entry_point` drops those.
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(BASE))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 12 steps with checkpoints 8 and 12."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "c.yaml").write_text(yaml.safe_dump(BASE))
    assert run(folder / "c.yaml", f"run={folder / 'r'}") == 0
    return folder / "r"


@pytest.fixture
def copied(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "r")
    return tmp_path / "r"


def one_line(capsys) -> str:
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    return err


def largest(step: Path) -> Path:
    return max((path for path in step.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


DAMAGE = {
    "values cut off": lambda step: largest(step).write_bytes(largest(step).read_bytes()[:100]),
    "values missing": lambda step: largest(step).unlink(),
    "no metadata": lambda step: (step / "state" / "_METADATA").unlink(),
    "no index": lambda step: (step / "state" / "manifest.ocdbt").unlink(),
    "position cut off": lambda step: (step / "data" / "metadata").write_text('{"next'),
    "no config": lambda step: shutil.rmtree(step / "config"),
    "nothing left": lambda step: shutil.rmtree(step) or step.mkdir(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_serves(config, copied, capsys, damage):
    steps = copied / "checkpoints"
    DAMAGE[damage](steps / "12")
    left = sorted(path.relative_to(steps / "12") for path in (steps / "12").rglob("*"))
    assert run(config, f"run={copied}") == 0
    out, err = capsys.readouterr()
    assert err.count("\n") == 1, err
    assert err.startswith(f"train.py: warning: {steps / '12'} is damaged: ")
    assert err.endswith("; it is now 12.damaged, and the run goes on from step 8\n")
    assert "resumed at step 8" in out
    # The step is saved again, and nothing of the damaged one is lost.
    assert sorted(path.relative_to(steps / "12.damaged") for path in (steps / "12.damaged").rglob("*")) == left
    state, position = newest(config, f"run={copied}")
    assert int(state.step) == position["next_index"] == 12
    assert [x["step"] for x in lines(copied)] == sorted({x["step"] for x in lines(copied)})


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(config, copied, capsys):
    steps = copied / "checkpoints"
    for step in ("8", "12"):
        largest(steps / step).unlink()
    assert run(config, f"run={copied}") == 2
    assert f"{steps}: no checkpoint is whole, of steps 12, 8: " in one_line(capsys)
    assert sorted(path.name for path in steps.iterdir()) == ["12", "8"]


def test_another_model_is_refused_without_falling_back(config, copied, capsys, monkeypatch):
    monkeypatch.setattr(dummy, "WIDTH", 8)
    assert run(config, f"run={copied}") == 2
    assert "12: was written by another model" in one_line(capsys)
    assert sorted(path.name for path in (copied / "checkpoints").iterdir()) == ["12", "8"]


def test_memory_that_runs_out_is_one_line_and_no_damage(config, copied, capsys, monkeypatch):
    def restore(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(Checkpoints, "restore", restore)
    assert run(config, f"run={copied}") == 1
    line = one_line(capsys)
    assert "RESOURCE_EXHAUSTED" in line
    assert "raise optim.accumulate or mesh.fsdp" in line
    assert sorted(path.name for path in (copied / "checkpoints").iterdir()) == ["12", "8"]


def test_files_that_cannot_be_read_now_are_read_again_and_never_taken_for_damage(config, copied, capsys, monkeypatch):
    """As when a network's file system fails for a moment, or longer; and when TensorStore is told so."""
    restore, tries = ocp.StandardCheckpointHandler.restore, []

    def stale(self, *args, **kwargs):
        tries.append(len(tries))
        if len(tries) <= failures:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return restore(self, *args, **kwargs)

    steps = copied / "checkpoints"
    monkeypatch.setattr(errors, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr(ocp.StandardCheckpointHandler, "restore", stale)
    failures = 3
    assert run(config, f"run={copied}", "steps=13") == 1
    told = (
        f"train.py: {steps / '12'} cannot be read: Stale file handle; nothing was changed, the same command tries again"
    )
    assert one_line(capsys) == f"{told}\n"
    assert len(tries) == 3
    file, failures = largest(steps / "12"), 0
    kept = file.rename(copied / "kept")
    file.symlink_to(file)
    assert run(config, f"run={copied}", "steps=13") == 1
    assert f"{steps / '12'} cannot be read: Too many levels of symbolic links; " in one_line(capsys)
    file.unlink()
    kept.rename(file)
    assert sorted(path.name for path in steps.iterdir()) == ["12", "8"]
    failures = len(tries) + 2
    assert run(config, f"run={copied}", "steps=13") == 0
    assert "resumed at step 12" in capsys.readouterr().out


@contextlib.contextmanager
def disk_of(size: int):
    """No file may have more than `size` bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def full_after(monkeypatch, step: int, size: int, saved: Path):
    """Fills the disk after the report of `step`, once the checkpoint `saved` is there; returns what empties it."""
    original, stack = progress.Reporter.report, contextlib.ExitStack()

    def watched(self, number, *rest):
        original(self, number, *rest)
        if number == step:
            while not saved.exists():
                time.sleep(0.01)
            stack.enter_context(disk_of(size))

    monkeypatch.setattr(progress.Reporter, "report", watched)
    return stack


@pytest.mark.parametrize(
    ("step", "size", "message"),
    [
        (8, 4000, "checkpoints cannot be written: File too large; free space there, or name another folder with run="),
        (5, 300, "r cannot be written: File too large"),
    ],
    ids=["checkpoint", "metrics"],
)
def test_a_full_disk_is_one_line_and_keeps_the_checkpoints(config, tmp_path, capsys, monkeypatch, step, size, message):
    folder = tmp_path / "r"
    with monkeypatch.context() as patch, full_after(patch, step, size, folder / "checkpoints" / "4"):
        assert run(config, f"run={folder}") == 1
    told = one_line(capsys)
    assert message in told
    assert told.endswith(f"; step 4 in {folder / 'checkpoints'} is whole, the same command goes on from it\n")
    assert run(config, f"run={folder}") == 0
    assert "resumed at step 4" in capsys.readouterr().out
    assert [x["step"] for x in lines(folder)] == [1, 4, 5, 8, 10, 12]


def test_a_full_disk_while_a_video_or_the_export_is_written_is_one_line(config, tmp_path, capsys, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device", str(tmp_path / "r" / "x"))

    flags = [f"run={tmp_path / 'r'}", "validation={every: 5, prompts: [x]}"]
    with monkeypatch.context() as patch:
        patch.setattr(dummy.Dummy, "validate", full)
        assert run(config, *flags) == 1
    told = one_line(capsys)
    assert told.startswith(f"train.py: {tmp_path / 'r' / 'x'} cannot be written: No space left on device; ")
    assert f"; step 4 in {tmp_path / 'r' / 'checkpoints'} is whole" in told
    with monkeypatch.context() as patch:
        patch.setattr(dummy.Dummy, "export", full)
        assert run(config, *flags) == 1
    assert f"; step 12 in {tmp_path / 'r' / 'checkpoints'} is whole" in one_line(capsys)
    assert run(config, *flags) == 0


@pytest.mark.parametrize("key", ["run", "checkpoint.folder"])
@pytest.mark.parametrize("where", ["file", "file/below", "/proc/nowhere/below"])
def test_folders_that_cannot_be_written_are_refused_before_anything(config, tmp_path, capsys, monkeypatch, key, where):
    monkeypatch.setattr(dummy.Dummy, "batches", lambda self: pytest.fail("the data were read"))
    (tmp_path / "file").write_text("mine")
    folder = tmp_path / where
    assert run(config, f"run={tmp_path / 'r'}", f"{key}={folder}") == 2
    reason = f"{tmp_path / 'file'} is a file" if "file" in where else "No such file or directory"
    told = one_line(capsys)
    assert told == f"train.py: {key}: {folder} cannot be written: {reason}; name another folder, as in {key}=...\n"
    assert (tmp_path / "file").read_text() == "mine"
    assert not (tmp_path / "r").exists()


def test_leftovers_of_a_failed_save_are_not_told(config, tmp_path, capsys, monkeypatch):
    async def write():
        raise AssertionError

    def leave(self):
        write()  # never awaited, and collected here
        raise RecordError("data/x[train]: record 17 is damaged")

    monkeypatch.setattr(dummy.Batches, "__next__", leave)
    assert run(config, f"run={tmp_path / 'r'}") == 1
    assert "record 17" in one_line(capsys)


def test_a_damaged_record_stops_the_run_after_its_checkpoint(config, tmp_path, capsys, monkeypatch):
    following = dummy.Batches.__next__

    def damaged(self):
        if self.index == 6:
            raise RecordError("data/x[train]: record 17 is damaged: why, or leave it out with data.leave_out=[17]")
        return following(self)

    with monkeypatch.context() as patch:
        patch.setattr(dummy.Batches, "__next__", damaged)
        assert run(config, f"run={tmp_path / 'r'}") == 1
    told = one_line(capsys)
    assert told.startswith("train.py: step 7: data/x[train]: record 17 is damaged: ")
    assert told.endswith(f"; step 4 in {tmp_path / 'r' / 'checkpoints'} is whole, the same command goes on from it\n")
    assert run(config, f"run={tmp_path / 'r'}") == 0
    assert "resumed at step 4" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_first_step_is_one_line(number, tmp_path):
    listening = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code = f"{listening}runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')"
    command = [sys.executable, "-c", code, str(ROOT / "configs/toy/stage1.yaml"), f"run={tmp_path}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not catches(process.pid, signal.SIGTERM):
            time.sleep(0.01)
        time.sleep(0.5)  # jax is being imported
        process.send_signal(number)
        error = process.communicate(timeout=30)[1]
    assert (process.returncode, error) == (130, f"train.py: interrupted by {number.name}\n")


def catches(pid: int, number: signal.Signals) -> bool:
    """True if the process has a handler for the signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    return bool(caught >> (number - 1) & 1)
