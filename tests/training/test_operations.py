"""Care for a long run: checkpoints, goodput, profiles, animations and Weights & Biases."""

import json
import sys
import time
import types

import numpy as np
import pytest
import yaml
from PIL import Image
from tensorboardX.proto import event_pb2, summary_pb2

from helios_jax.training import progress
from helios_jax.training.goodput import Goodput
from tests.training import dummy
from tests.training.test_loop import BASE, lines, run


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(BASE))
    return path


def kept(folder) -> list[int]:
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


def test_the_best_checkpoints_and_every_nth_stay(config, tmp_path, monkeypatch):
    losses = iter([5, 4, 9, 1, 8, 7, 3, 6])

    def loss(self, model, batch, keys):
        error, metrics = dummy_loss(self, model, batch, keys)
        return error, {**metrics, "rank": batch["step"].astype(float)}

    dummy_loss = dummy.Dummy.loss
    monkeypatch.setattr(dummy.Dummy, "loss", loss)
    monkeypatch.setattr("helios_jax.training.loop._mean", lambda *_: {"loss": 1.0, "rank": float(next(losses))})
    flags = ["steps=8", "checkpoint.every=1", "checkpoint.keep=1", "checkpoint.keep_best=2", "checkpoint.keep_every=5"]
    assert run(config, f"run={tmp_path / 'r'}", "log_every=1", "checkpoint.metric=rank", *flags) == 0
    assert kept(tmp_path / "r") == [4, 5, 7, 8]  # ranks 1 and 3, the fifth, the newest


def test_a_metric_that_is_not_there_is_one_line(config, tmp_path, capsys):
    flags = ["checkpoint.keep_best=1", "checkpoint.metric=fid"]
    assert run(config, f"run={tmp_path / 'r'}", *flags) == 2
    assert "checkpoint.metric: there is no 'fid'; name one of loss, grad_norm, " in capsys.readouterr().err
    assert run(config, f"run={tmp_path / 'r'}", "checkpoint.metric=fid") == 2
    assert "checkpoint.metric is fid, but no checkpoint is kept for it; set keep_best" in capsys.readouterr().err


def test_a_metric_without_a_share_in_some_steps_keeps_the_best_of_the_others(config, tmp_path, capsys):
    """With one sample a step, about half of the steps have none for `loss_positive`."""
    flags = ["data.batch_size=1", "log_every=1", "checkpoint.every=1", "checkpoint.keep=1", "checkpoint.keep_best=1"]
    assert run(config, f"run={tmp_path / 'r'}", "steps=8", "checkpoint.metric=loss_positive", *flags) == 0
    lines = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line["loss_positive"] for line in lines if "loss_positive" in line}
    assert 0 < len(found) < 8
    assert kept(tmp_path / "r") == sorted({min(found, key=found.__getitem__), 8})
    assert run(config, f"run={tmp_path / 'r'}", "steps=9", "checkpoint.metric=loss_positive", *flags) == 0
    assert 9 in kept(tmp_path / "r")


def test_goodput_counts_what_was_computed_once(config, tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: now[0])
    goodput = Goodput({}, began=90.0)
    now[0] = 110.0  # compiling
    assert goodput.report()["goodput"] == 0
    now[0] = 140.0
    goodput.lose("input", 4.0)
    with goodput.losing("saving"):
        now[0] = 146.0
    first = goodput.report()
    assert (first["computing_seconds"], first["input_seconds"], first["saving_seconds"]) == (26.0, 4.0, 6.0)
    assert first["goodput"] == pytest.approx(26 / 56)
    now[0] = 180.0  # the next process, after a kill
    again = Goodput(first, began=170.0)
    now[0] = 190.0
    again.report()
    now[0] = 200.0
    assert again.report()["goodput"] == pytest.approx(36 / 110)


def test_a_run_that_goes_on_goes_on_counting(config, tmp_path):
    folder = tmp_path / "r"
    assert run(config, f"run={folder}", "steps=8") == 0
    assert run(config, f"run={folder}") == 0
    told = lines(folder)
    assert len({line["began"] for line in told}) == 1
    computing = [line["computing_seconds"] for line in told]
    assert computing == sorted(computing)
    assert computing[-1] > 0
    assert all(0 <= line["goodput"] <= 1 for line in told)


def test_lines_fit_80_columns(config, tmp_path, capsys):
    assert run(config, f"run={tmp_path / 'r'}", "log_every=1") == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(told) == 12
    assert all(len(line) <= 80 for line in told)
    assert all(" left  " in line and " steps/s  loss " in line for line in told[1:])


def test_a_profile_of_some_steps(config, tmp_path, capsys):
    assert run(config, f"run={tmp_path / 'r'}", "--profile", "2", "steps=6") == 0
    assert "profile of steps in" in capsys.readouterr().out
    assert list((tmp_path / "r" / "profile").rglob("*.xplane.pb"))
    assert run(config, f"run={tmp_path / 'r'}", "--profile", "2", "steps=7") == 0
    assert "no step was recorded: this process made 1, and the first 2 are left out" in capsys.readouterr().out
    assert run(config, f"run={tmp_path / 'r'}", "--profile=0") == 2
    assert "must be a number from 1 up, got 0" in capsys.readouterr().err


def test_a_validation_video_moves_in_tensorboard(config, tmp_path, monkeypatch):
    video = np.zeros((70, 40, 700, 3), np.uint8)
    video[:, :, :, 0] = np.arange(70)[:, None, None]
    monkeypatch.setattr(dummy.Dummy, "validate", lambda *_: {"0": video})
    assert run(config, f"run={tmp_path / 'r'}", "validation={every: 5, prompts: [x]}") == 0
    images = [value.image for value in summaries(tmp_path / "r" / "tensorboard") if value.tag == "validation/0"]
    assert len(images) == 2
    path = tmp_path / "0.gif"
    path.write_bytes(images[0].encoded_image_string)
    with Image.open(path) as shown:
        assert shown.size == (images[0].width, images[0].height) == (234, 14)
        assert shown.n_frames == 24
    assert len(progress.animation(video[:1])) > 0


def summaries(folder) -> list[summary_pb2.Summary.Value]:
    """The values of TensorBoard's files."""
    found = []
    for path in sorted(folder.glob("events*")):
        data = path.read_bytes()
        while data:  # length, its checksum, the event, its checksum
            size = int.from_bytes(data[:8], "little")
            found += event_pb2.Event.FromString(data[12 : 12 + size]).summary.value
            data = data[16 + size :]
    return found


def test_weights_and_biases_get_the_metrics(config, tmp_path, capsys, monkeypatch):
    assert run(config, f"run={tmp_path / 'r'}", "wandb=helios") == 2
    assert "wandb: the package is not installed; pip install wandb, or set" in capsys.readouterr().err

    begun, told = [], []
    fake = types.ModuleType("wandb")
    fake.__spec__ = types.SimpleNamespace()
    log = lambda values, step: told.append((step, values))  # noqa: E731
    ended = types.SimpleNamespace(log=log, finish=lambda: told.append("end"))
    fake.init = lambda **settings: begun.append(settings) or ended
    monkeypatch.setitem(sys.modules, "wandb", fake)
    assert run(config, f"run={tmp_path / 'r'}", "wandb=helios", "steps=8") == 0
    assert run(config, f"run={tmp_path / 'r'}", "wandb=helios") == 0
    assert [settings["project"] for settings in begun] == ["helios"] * 2
    assert begun[0]["id"] == begun[1]["id"]
    assert begun[1]["resume"] == "allow"
    assert [x if x == "end" else x[0] for x in told] == [1, 4, 5, 8, "end", 9, 10, 12, "end"]
    assert json.loads(json.dumps(told[0][1]))["loss"] == lines(tmp_path / "r")[0]["loss"]
