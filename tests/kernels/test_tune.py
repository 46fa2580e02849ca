"""The tuner, with an op whose sizes are a delay: its choice, omissions, writes and refusals."""

import dataclasses
import json
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.core import tiles
from pallas_kernels.core.device import compiling_for
from pallas_kernels.tools import tunable, tune
from pallas_kernels.tools.tunable import Op

GPU = SimpleNamespace(platform="cuda", device_kind="NVIDIA Abacus")


def kernel(sizes):
    if sizes["block"] == 3:
        return lambda x: x + 1  # wrong
    if sizes["block"] == 4:

        def refused(x):
            raise ValueError("Mosaic GPU kernel exceeds available shared memory")

        return refused

    def slow(x):
        def wait(x):
            time.sleep(sizes["block"] / 1000)
            return x

        return jax.pure_callback(wait, x, x)

    return slow


OP = Op(
    axes={"n": 8, "dim": 4},
    length="n",
    fixed=("dim",),
    work=lambda shape: 8e9 * shape["n"],
    unit="B",
    arguments=lambda shape: (jnp.ones((shape["n"], shape["dim"])),),
    candidates=lambda platform, shape: [{"block": block} for block in (20, 1, 3, 4)],
    kernel=kernel,
    alternatives=lambda platform: {"xla": lambda x: x},
)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A copy of the table for writing, the fake op, and the time of one call."""
    path = tmp_path / "tiles.json"
    path.write_text(tiles.PATH.read_text())
    monkeypatch.setattr(tiles, "PATH", path)
    monkeypatch.setattr(tunable, "REPEATS", 1)
    monkeypatch.setattr(tunable, "SPEND", 0)
    monkeypatch.setitem(tune.OPS, "fake", OP)
    tiles.table.cache_clear()
    yield path
    tiles.table.cache_clear()


def run(*arguments: str):
    with compiling_for(GPU):
        tune.main([*arguments, "--limit", "0"])


def test_fastest_sizes_are_added_to_the_table(table, capsys):
    before = json.loads(table.read_text())
    run("fake", "--shape", "n=16", "--write")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("fake, n=16 dim=4, on NVIDIA Abacus")
    assert [line.split()[0] for line in lines[1:6]] == ["xla", "block=20", "block=1", "block=3", "block=4"]
    assert lines[1].endswith("GB/s")
    assert lines[4].split() == ["block=3", "wrong"]
    assert lines[5].split() == ["block=4", "shared", "memory"]
    assert lines[6] == "fastest: block=1"
    assert json.loads(table.read_text()) == before | {"fake": {"NVIDIA Abacus": {"16": {"block": 1}}}}
    assert tiles.lookup("fake", "NVIDIA Abacus", 9) == {"block": 1}
    with pytest.raises(KeyError, match="no sizes for fake over 17 tokens on NVIDIA Abacus"):
        tiles.lookup("fake", "NVIDIA Abacus", 17)


def test_nothing_is_written_without_the_option(table, capsys):
    before = table.read_text()
    run("fake")
    assert table.read_text() == before


def test_other_lengths_and_kinds_stay(table):
    tiles.write("attention", "NVIDIA H100 80GB HBM3", 11040, {"block_q": 1})
    tiles.write("attention", "NVIDIA H100 80GB HBM3", 512, {"block_q": 2})
    kind, general = "NVIDIA H100 80GB HBM3", tiles.table()["attention"]["NVIDIA"][""]
    got = [tiles.lookup("attention", kind, length) for length in (512, 513, 11041)]
    assert got == [{"block_q": 2}, {"block_q": 1}, general]
    assert '      "512": {"block_q": 2},\n      "11040": {"block_q": 1}\n' in table.read_text()


def test_committed_table_has_the_tuner_format():
    assert tiles.text(json.loads(tiles.PATH.read_text())) == tiles.PATH.read_text()


def test_first_candidate_wins_a_tie():
    results = [tune.Result(name, sizes, 1.0) for name, sizes in (("xla", None), ("a", {"x": 1}), ("b", {"x": 2}))]
    assert tune.fastest(results) == results[1]
    assert tune.fastest(results[:1]) is None


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["fakes"], "there is no op 'fakes'; there are adaln, "),
        (["fake", "--shape", "m=3"], "takes n=SIZE dim=SIZE, not 'm=3'"),
        (["fake", "--shape", "n=0"], "takes n=SIZE dim=SIZE, not 'n=0'"),
        (["fake", "--shape", "dim=3", "--write"], "tiles.json is for dim=4"),
    ],
)
def test_invalid_arguments_are_refused_in_one_line(table, arguments, line):
    with pytest.raises(SystemExit) as refused:
        run(*arguments)
    message = str(refused.value)
    assert line in message
    assert "\n" not in message


def test_no_sizes_run(table, monkeypatch):
    before = table.read_text()
    monkeypatch.setitem(tune.OPS, "fake", dataclasses.replace(OP, candidates=lambda *_: [{"block": 4}]))
    with pytest.raises(SystemExit, match="no sizes of fake ran"):
        run("fake", "--write")
    assert table.read_text() == before


def test_a_cpu_has_nothing_to_tune(capsys):
    with pytest.raises(SystemExit) as end:
        tune.main(["attention"])
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        "tune: there is nothing to tune on a CPU: kernels run on GPUs and TPUs"
    ]


@pytest.mark.parametrize("name", ["attention", "attention_dq", "attention_dkv", "attention_float32"])
def test_attention_trials_compute_the_same_function(name):
    """For gradients, only the backward pass of the same function is timed."""
    op = tune.OPS[name]
    arguments = op.arguments({"b": 1, "n": 3, "heads": 2, "head_dim": 8})
    attend = op.alternatives("tpu")["xla"]
    function, inputs = op.prepared(attend, arguments)
    values, gradients = jax.vjp(attend, *arguments[:3])
    expected = gradients(arguments[3]) if name in ("attention_dq", "attention_dkv") else values
    got = jax.jit(lambda *inputs: tunable.repeated(function, *inputs))(*inputs)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
        np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (a, b)), atol=op.tolerance)
    assert len(op.candidates("gpu", op.axes)) > 3
    assert (op.candidates("tpu", op.axes) == []) == (name in ("attention_dq", "attention_float32"))


@pytest.mark.parametrize(
    ("name", "head_dim"),
    [("adaln", 64), ("adaln_backward", 64), ("norm_rope", 64), ("norm_rope_backward", 128), ("gated_residual", 64)],
)
def test_norm_trials_compute_the_same_function(name, head_dim):
    """The kernel computes the same as the alternative, on an interpreted TPU."""
    op = tune.OPS[name]
    arguments = op.arguments({"b": 1, "n": 33, "heads": 2, "head_dim": head_dim})
    sizes = op.candidates("tpu", op.axes)[0]
    expected = jax.jit(op.alternatives("tpu")["xla"])(*arguments)
    with compiling_for(SimpleNamespace(platform="tpu", device_kind="TPU v5")), pltpu.force_tpu_interpret_mode():
        got = jax.jit(op.kernel(sizes))(*arguments)
    assert tunable.distance(got, expected) < op.tolerance
    assert (len(op.candidates("gpu", op.axes)) > 3) == (name != "norm_rope_backward")
