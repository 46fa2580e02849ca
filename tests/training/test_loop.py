"""The training loop through train.main: resume, signals, NaN, exports, bad input."""

import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

import train
from helios_jax.runtime import hosts
from helios_jax.sharding import MeshConfig, make_mesh
from helios_jax.training import optim
from helios_jax.training.run_checkpoints import Checkpoints
from helios_jax.training.stage import Player
from helios_jax.training.stage_table import load_config as load
from helios_jax.training.state import abstract_like, init_sharded
from helios_jax.training.trainer import fit_mesh
from tests.closeness import assert_close
from tests.training import dummy

BASE = {
    "stage": "tests.training.dummy.Dummy",
    "steps": 12,
    "log_every": 5,
    "data": {"batch_size": 4},
    "optim": {"lr": 1e-2, "warmup_steps": 3, "schedule": "cosine", "ema": {"decay": 0.9, "start": 2}},
    "checkpoint": {"every": 4, "keep": 2},
}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(BASE))
    return path


def run(config, *overrides, **variables):
    os.environ.update({k: str(v) for k, v in variables.items()})
    try:
        return train.main([str(config), *overrides])
    finally:
        for k in variables:
            del os.environ[k]


def newest(config, *overrides):
    """(state, data position) of the newest checkpoint of a run."""
    got = load(config, overrides)
    optimizer = optim.make_optimizer(got.optim, got.steps)
    mesh = fit_mesh(got)
    state = init_sharded(
        dummy.Dummy(got).init,
        jax.random.key(got.seed),
        optimizer,
        got.optim.ema,
        mesh,
        names=got.trainable,
        frozen_dtype=got.precision,
        offload=got.optim.offload,
    )
    return Checkpoints(f"{got.run}/checkpoints", got.checkpoint.keep).restore(abstract_like(state))[:2]


def lines(folder):
    return [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_resumed_run_equals_uninterrupted_run_bit_for_bit(config, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(config, f"run={whole}") == 0
    # Ended by SIGTERM before step 7: not at a checkpoint's step, and in the middle of a window of the log.
    assert run(config, f"run={parts}", DUMMY_SIGNAL_AT=7, DUMMY_SIGNAL=int(signal.SIGTERM)) == 75
    assert not (parts / "weight.npy").exists()
    assert newest(config, f"run={parts}")[1] == {"next_index": 6}
    assert run(config, f"run={parts}") == 0
    assert "resumed at step 6" in capsys.readouterr().out

    a, b = newest(config, f"run={whole}"), newest(config, f"run={parts}")
    assert int(a[0].step) == 12
    assert a[1] == b[1] == {"next_index": 12}
    assert same(a[0], b[0])  # parameters, both moments, counters, average
    assert not same(a[0].model, a[0].ema)
    assert np.array_equal(np.load(whole / "weight.npy"), np.asarray(a[0].ema.up.weight[...]))
    steps = [x["step"] for x in lines(parts)]
    assert steps == sorted(set(steps))
    assert lines(whole)[-1]["loss"] < lines(whole)[0]["loss"]


def test_resuming_tells_what_changed_and_extends(config, tmp_path, capsys):
    assert run(config, f"run={tmp_path / 'r'}") == 0
    assert run(config, f"run={tmp_path / 'r'}", "steps=14", "optim.lr=5e-3") == 0
    assert "optim.lr was 0.01, is 0.005; steps was 12, is 14" in capsys.readouterr().out
    assert load(tmp_path / "r" / "config.yaml", []).steps == 14


def test_ctrl_c_saves_and_exits_130(config, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    assert run(config, f"run={tmp_path / 'r'}", DUMMY_SIGNAL_AT=4, DUMMY_SIGNAL=int(signal.SIGINT)) == 130
    assert int(newest(config, f"run={tmp_path / 'r'}")[0].step) == 3
    assert signal.getsignal(signal.SIGINT) is before


def test_nan_stops_and_keeps_the_last_good_checkpoint(config, tmp_path, capsys):
    folder = tmp_path / "r"
    assert run(config, f"run={folder}", DUMMY_POISON=10) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "step 10: loss is nan; its batch is clip 10.0, clip 10.1, clip 10.2, clip 10.3, see" in error
    assert "; step 8 in" in error
    assert json.loads((folder / "not_finite_0.json").read_text())["ids"] == [f"clip 10.{i}" for i in range(4)]
    state, position = newest(config, f"run={folder}")
    assert int(state.step) == 8
    assert position == {"next_index": 8}
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def test_metrics_of_some_samples_count_every_sample_alike(config, tmp_path):
    """The mean of a part of the samples over five steps, against the sums of each step."""
    assert run(config, f"run={tmp_path / 'one'}", "log_every=1", "steps=5") == 0
    assert run(config, f"run={tmp_path / 'five'}", "checkpoint.every=9", "steps=5") == 0
    one, five = ([x for x in lines(tmp_path / name)] for name in ("one", "five"))
    batches = dummy.Dummy(load(config, [])).batches(make_mesh(MeshConfig()))
    counts = [int((next(batches)["x"][:, 0] > 0).sum()) for _ in range(5)]
    assert min(counts) < max(counts)
    expected = np.average([x.get("loss_positive", 0.0) for x in one[1:]], weights=counts[1:])
    assert five[-1]["loss_positive"] == pytest.approx(expected, rel=1e-5)  # the first step is reported on its own


def test_accumulated_gradients_are_those_of_the_whole_batch(config, tmp_path):
    flags = ["data.batch_size=8", "steps=3"]
    for name, parts in (("whole", 1), ("parts", 4)):
        assert run(config, f"run={tmp_path / name}", *flags, f"optim.accumulate={parts}") == 0
    whole, parts = (newest(config, f"run={tmp_path / name}", *flags)[0] for name in ("whole", "parts"))
    assert_close(parts, whole)
    for a, b in zip(*(lines(tmp_path / name) for name in ("whole", "parts")), strict=True):
        for name in ("loss", "grad_norm", "noise", "loss_positive"):
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-7), name


def test_what_is_not_trained_stays_and_is_not_saved(config, tmp_path):
    flags = [f"run={tmp_path / 'r'}", r"trainable=[down,up\.bias]", "optim.ema=null", "precision=float32", "steps=4"]
    assert run(config, *flags) == 0
    got = load(config, flags)
    begin, (end, *_) = dummy.Dummy(got).init(jax.random.key(got.seed)), newest(config, *flags)
    moved = {
        jax.tree_util.keystr(path): bool(
            np.abs(np.asarray(a) - np.asarray(b)).max() > 1e-5
        )  # begin is another program's
        for (path, a), b in zip(jax.tree.leaves_with_path(begin), jax.tree.leaves(end.model), strict=True)
    }
    assert moved == {name: "up.weight" not in name for name in moved}
    assert sum(moved.values()) == len(moved) - 1 == 3
    stored = Checkpoints(tmp_path / "r" / "checkpoints", 2)._manager.item_metadata(4).state
    names = {name for name in stored if "weight" in name}
    assert names == {"model/down/0/weight", "opt_state/1/0/mu/down/0/weight", "opt_state/1/0/nu/down/0/weight"}
    assert run(config, *flags[:-1], "steps=5") == 0


def test_fewer_steps_than_were_made_are_refused(config, tmp_path, capsys):
    flags = [f"run={tmp_path / 'r'}", "optim.ema=null"]
    assert run(config, *flags, "steps=4") == 0
    capsys.readouterr()
    assert run(config, *flags, "steps=2") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "steps is 2, but" in error
    assert error.endswith("is at step 4: set steps=4 to export it, or name another run\n")
    assert run(config, *flags, "steps=4") == 0


def test_frozen_parameters_that_changed_are_one_line(config, tmp_path, capsys):
    flags = [f"run={tmp_path / 'r'}", "trainable=[down]"]
    assert run(config, *flags, "steps=2") == 0
    assert run(config, *flags, "steps=3", "seed=1") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "the parameters that are not trained are others now; give init (or seed) as it was" in error


@pytest.mark.parametrize(("precision", "products"), [("float32", "highest"), ("bfloat16", None)])
def test_float32_is_multiplied_as_float32(config, tmp_path, monkeypatch, precision, products):
    seen, loss = set(), dummy.Dummy.loss

    def watched(*args):
        seen.add(jax.config.jax_default_matmul_precision)
        return loss(*args)

    monkeypatch.setattr(dummy.Dummy, "loss", watched)
    assert run(config, f"run={tmp_path}", "steps=1", f"precision={precision}") == 0
    assert seen == {products}


def test_validates_at_intervals(config, tmp_path):
    folder = tmp_path / "r"
    assert run(config, f"run={folder}", "validation={every: 5, prompts: [x]}") == 0
    assert sorted(p.name for p in (folder / "validation").iterdir()) == ["step_000005", "step_000010"]
    plain = tmp_path / "plain"
    assert run(config, f"run={plain}") == 0
    np.testing.assert_array_equal(*(np.load(p / "weight.npy") for p in (folder, plain)))


def test_hosts_wait_for_the_export_of_the_first(config, tmp_path, monkeypatch):
    """At its exit jax waits for 5 minutes, and then ends all hosts as failed."""
    order, gather = [], hosts.gather
    monkeypatch.setattr(hosts, "gather", lambda name, text: order.append(name) or gather(name, text))
    monkeypatch.setattr(dummy.Dummy, "export", lambda *of: order.append("export"))
    assert run(config, f"run={tmp_path / 'r'}", "steps=1") == 0
    assert order == ["export", "exported"]


def test_a_signal_in_validation_ends_it_and_the_run(config, tmp_path, monkeypatch, capsys):
    """At a step that was not saved, and at the last one, which was; no step follows."""
    stopped = []

    def validate(self, model, folder, stop):
        stopped.append(stop())
        os.kill(os.getpid(), signal.SIGTERM)
        stopped.append(stop())
        return {}

    monkeypatch.setattr(dummy.Dummy, "validate", validate)
    folder = tmp_path / "r"
    for step in (5, 12):
        assert run(config, f"run={folder}", f"validation={{every: {step}, prompts: [x]}}") == 75
        assert f"SIGTERM: saved step {step} in " in capsys.readouterr().out
        assert newest(config, f"run={folder}")[1] == {"next_index": step}
    assert stopped == [False, True] * 2


def test_state_in_the_host_s_memory_is_the_same_run(config, tmp_path, monkeypatch):
    """A checkpoint from there is read back into either memory, and the run goes on."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(config, f"run={whole}", "optim.accumulate=2") == 0
    monkeypatch.setattr("helios_jax.training.state.GROUP", 1)  # each array on its own
    host = (f"run={parts}", "optim.accumulate=2", "optim.offload=host")
    for step in (4, 8):
        assert run(config, *host, DUMMY_SIGNAL_AT=step + 1, DUMMY_SIGNAL=int(signal.SIGTERM)) == 75
    state, _ = newest(config, *host)
    kinds = {False: set(), True: set()}
    for x in jax.tree.leaves((state.opt_state, state.ema)):
        kinds[x.ndim > 0].add(x.sharding.memory_kind)
    device = jax.devices()[0].default_memory().kind
    assert kinds == {False: {device}, True: {"pinned_host"}}
    assert {x.sharding.memory_kind for x in jax.tree.leaves((state.params, state.best))} == {device}
    assert run(config, f"run={parts}", "optim.accumulate=2") == 0
    assert_close(*(np.load(p / "weight.npy") for p in (whole, parts)))


@pytest.mark.parametrize("where", ["optim.offload=null", "optim.offload=host"])
def test_two_players_of_one_loss_are_as_one(config, tmp_path, where):
    folders = tmp_path / "one", tmp_path / "two"
    for folder, stage in zip(folders, ("Dummy", "Duel")):
        assert run(config, f"run={folder}", f"stage=tests.training.dummy.{stage}", "optim.accumulate=2", where) == 0
    assert_close(*(np.load(folder / "weight.npy") for folder in folders))
    norms = [[line["grad_norm"] for line in lines(folder)] for folder in folders]
    assert_close(*(np.array(norm) for norm in norms))


def test_a_player_takes_its_turns_only():
    player = Player(lambda x: (x, {}), every=3)
    taken = jax.jit(lambda step: player.take(step, lambda x: x + 1, jnp.arange(2.0)))
    for step in range(4):
        assert taken(step).tolist() == ([1.0, 2.0] if step % 3 == 0 else [0.0, 0.0])


def test_keeps_the_newest_and_ignores_a_killed_save(config, tmp_path):
    folder = tmp_path / "r"
    assert run(config, f"run={folder}") == 0
    steps = folder / "checkpoints"
    assert sorted(p.name for p in steps.iterdir()) == ["12", "8"]
    # What a process leaves that is killed while Orbax writes step 16.
    (steps / "16.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    assert int(newest(config, f"run={folder}")[0].step) == 12
    assert run(config, f"run={folder}", "steps=16") == 0
    assert int(newest(config, f"run={folder}", "steps=16")[0].step) == 16


def test_saving_copies_before_the_step_takes_the_memory(config, tmp_path):
    got = load(config, [f"run={tmp_path}"])
    optimizer = optim.make_optimizer(got.optim, got.steps)
    mesh = fit_mesh(got)
    state = init_sharded(dummy.Dummy(got).init, jax.random.key(9), optimizer, got.optim.ema, mesh)
    expected = jax.tree.map(np.array, state)
    template = abstract_like(state)
    checkpoints = Checkpoints(tmp_path / "c", 1)
    checkpoints.save(state, {"next_index": 0}, got)
    spoil = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    for _ in range(20):
        state = spoil(state)
    checkpoints.wait()
    assert same(checkpoints.restore(template)[0], expected)


def test_a_device_without_its_host_s_memory_is_refused(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("helios_jax.runtime.offload.HOST", "remote")
    assert run(config, f"run={tmp_path / 'r'}", "optim.offload=host") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "optim.offload: cpu keeps no arrays in its host's memory; set it to null" in error


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["steps=0"], "steps must be at least 1"),
        (["optim.lrr=1"], "did you mean lr"),
        (["mesh.tensor=3"], "does not fit 1 devices"),
        (["checkpoint.every=never"], "must be a whole number"),
        (["optim.accumulate=3"], "must be a multiple of optim.accumulate"),
        (["trainable=[up,middle]"], "no parameter is named 'middle'; names begin with down, up"),
        (["trainable=[adapters]"], "the run makes none; give lora.rank"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(config, tmp_path, capsys, overrides, message):
    assert run(config, f"run={tmp_path / 'r'}", *overrides) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "r").exists()


def test_checkpoint_of_another_model_is_one_line(config, tmp_path, capsys, monkeypatch):
    assert run(config, f"run={tmp_path / 'r'}", "steps=1") == 0
    monkeypatch.setattr(dummy, "WIDTH", 8)
    assert run(config, f"run={tmp_path / 'r'}", "steps=2") == 2
    assert "was written by another model" in capsys.readouterr().err


def test_learning_rate(config):
    got = load(config, ["optim.final_lr=1e-3", "steps=103"])
    rate = optim.learning_rate(got.optim, got.steps)
    np.testing.assert_allclose([rate(0), rate(2), rate(3), rate(103)], [1e-2 / 3, 1e-2, 1e-2, 1e-3], rtol=1e-5)
