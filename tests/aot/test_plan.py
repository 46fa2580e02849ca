"""Answers of the planner that need a compiler: stage 1 of the 14B model on the pods that people rent.

The heavy ones, for `make test-all`, are stage 3 and the compiled rows of docs/pods.md.
"""

import re

import pytest

from helios_jax.planner import analytic, command, program, search
from helios_jax.planner.analytic import Work
from helios_jax.planner.machines import machine
from helios_jax.planner.report import page
from tests.processes import ROOT

GB = 1e9
# | `config` | machine | settings | GB of GB | seconds | MFU | compiled |
ROW = re.compile(
    r"\| `(\S+)` \| (?:one )?(\S+) \| (.+?) \| ([\d.]+) of \d+ \| ([\d.]+) \| \d+% \| compiled", re.MULTILINE
)
DOCUMENTED = ROW.findall((ROOT / "docs/pods.md").read_text())


@pytest.fixture(scope="module")
def stage1():
    """The planner's knowledge of stage 1 in parts of a number, and its config."""

    def work(accumulate: int, fsdp: int, remat: str) -> Work:
        overrides = [f"optim.accumulate={accumulate}", f"mesh.fsdp={fsdp}", f"remat={remat}"]
        return Work.of(program.open_config("configs/stage1_init.yaml", overrides))

    return work


def answer(work: Work, name: str, title: str = "stage1_init"):
    rented = machine(name)
    found = command.compiled(work, search.given(work, rented), rented, all_effort=False)
    print("\n" + page(title, work, rented, found, [], 1))
    return rented, found


@pytest.fixture(scope="module")
def v5p(stage1):
    work = stage1(2, 16, "block")
    return work, *answer(work, "v5p-128")


def test_stage1_fits_a_v5p_128(v5p):
    _, rented, found = v5p
    assert found.fits(rented)
    assert found.memory.peak == pytest.approx(31.4 * GB, rel=0.05)
    assert found.memory.frozen == pytest.approx(1.8 * GB, rel=0.02)
    assert found.memory.optimizer == pytest.approx(2 * found.memory.parameters, rel=0.01)


def test_trip_counts_give_the_operations_that_the_model_needs(v5p):
    """A compiled step computes the model's own operations and the forward pass once more.

    The gradient of attention computes the scores again, one product of five, and its kernel pads tokens to blocks.
    """
    work, _, found = v5p
    samples = analytic.samples(work.config, found.candidate.mesh) * work.config.optim.accumulate
    expected = samples * (work.model_flops + work.forward_flops + work.attention_flops / 2)
    assert sum(found.cost.flops.values()) == pytest.approx(expected, rel=0.03)


def test_the_estimate_is_close_to_what_is_compiled(v5p):
    _, _, found = v5p
    estimate = found.candidate
    assert estimate.memory.peak == pytest.approx(found.memory.peak, rel=1 / 6)
    assert estimate.cost.seconds == pytest.approx(found.cost.seconds, rel=1 / 6)
    assert estimate.cost.received["all-gather"] == pytest.approx(found.cost.received["all-gather"], rel=1 / 6)


def test_stage1_fits_a_v6e_256(stage1):
    work = stage1(1, 16, "block")
    rented, found = answer(work, "v6e-256")
    assert found.fits(rented)
    assert found.candidate.memory.peak == pytest.approx(found.memory.peak, rel=1 / 6)
    assert found.candidate.cost.seconds == pytest.approx(found.cost.seconds, rel=1 / 6)


def test_what_does_not_fit_is_told_with_a_remedy(capsys):
    """The compiler finds no room on a v5e's 16 GB, and the page says how much is missing."""
    arguments = [
        "configs/stage1_init.yaml",
        "--topology",
        "v5e-256",
        "mesh.fsdp=16",
        "optim.accumulate=1",
        "remat=block",
    ]
    assert command.main(arguments) == 1
    out, err = capsys.readouterr()
    assert "DOES NOT FIT" in out
    assert err.count("\n") == 1
    assert "GB of each chip are missing" in err


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("config", "name", "settings", "peak", "seconds"), DOCUMENTED, ids=[" ".join(row[:3]) for row in DOCUMENTED]
)
def test_a_documented_row_is_what_is_compiled(config, name, settings, peak, seconds):
    overrides = settings.split("`")[1].split() if "`" in settings else ["mesh.fsdp=1"]
    rented, found = answer(Work.of(program.open_config(f"configs/{config}.yaml", overrides)), name, config)
    assert found.fits(rented)
    assert found.memory.peak == pytest.approx(float(peak) * GB, rel=0.03)
    assert found.cost.seconds == pytest.approx(float(seconds), rel=0.05)
