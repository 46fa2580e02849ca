"""The check of kernels on a device, here an interpreted TPU."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.adaln import tpu as adaln_tpu
from pallas_kernels.core.device import compiling_for
from pallas_kernels.tools import check

TPU = SimpleNamespace(platform="tpu", device_kind="TPU v5")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Cases of one token: larger ones are slow in interpret mode."""
    tokens = [case for case in check.cases() if " 1 tokens" in case.what or " 1 queries" in case.what]
    few = [case for case in tokens if case.dtype == "float32" or case.op == "adaln"]
    monkeypatch.setattr(check, "cases", lambda: iter(few))


def run(*ops: str) -> int:
    with compiling_for(TPU), pltpu.force_tpu_interpret_mode():
        return check.main([*ops, "--limit", "0"])


def test_correct_kernels_pass(capsys):
    assert run() == 0
    first, *lines, last = capsys.readouterr().out.splitlines()
    assert first.startswith("TPU v5, jax ")
    assert {line.split()[0] for line in lines} == {"attention", "norm_rope", "adaln", "gated_residual"}
    assert {line.split()[1] for line in lines} == {"bfloat16", "float32"}
    assert last == "all are right"


def test_each_case_is_a_line_of_json(tmp_path, capsys):
    path = tmp_path / "found.jsonl"
    assert run("adaln", "--json", str(path)) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["phase"], row["op"], row["dtype"], row["verdict"]) for row in rows] == [
        ("check", "adaln", dtype, "ok") for dtype in ("bfloat16", "float32")
    ]
    assert all(0 < row["error"] < 1e-2 and row["moved"] == 0 and row["seconds"] > 0 for row in rows)


def test_results_that_differ_between_runs_are_reported():
    """Another result of the same program and inputs: some of its sums were read before they were ready."""
    (case,) = (c for c in check.cases() if c.op == "adaln" and c.dtype == "float32")
    factors = iter((1.0, 1.0 + 1e-5, 1.0))

    def race(*inputs):
        factor = jax.pure_callback(lambda: np.float32(next(factors)), jax.ShapeDtypeStruct((), jnp.float32))
        return case.reference(*inputs) * factor

    result = check.measure(dataclasses.replace(case, ours=race))
    assert result["verdict"] == "moves"
    assert 5e-6 < result["moved"] < 2e-5
    assert check.measure(dataclasses.replace(case, ours=case.reference))["verdict"] == "ok"


def test_wrong_and_failing_kernels_are_reported(capsys, monkeypatch):
    forward = adaln_tpu.forward

    def broken(x, *args, **kwargs):
        if x.dtype == "float32":
            raise AssertionError("no such layout\nand more")  # as Mosaic's own checks do
        return 1.02 * forward(x, *args, **kwargs)

    monkeypatch.setattr(adaln_tpu, "forward", broken)
    assert run("adaln") == 1
    _, half, full, last = capsys.readouterr().out.splitlines()
    assert half.endswith("wrong")
    assert full.endswith("failed: AssertionError: no such layout")
    assert last == "2 are not right"


def test_exits_with_2_without_an_accelerator(capsys):
    assert check.main([]) == 2
    assert capsys.readouterr().err == "check: there is nothing to check on a CPU: kernels run on GPUs and TPUs\n"
    assert run("atention") == 2
    assert "no op 'atention'; there are adaln, " in capsys.readouterr().err
