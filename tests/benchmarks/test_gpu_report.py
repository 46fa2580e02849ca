"""The GPU report: what its rows say, phases that hang or fail, defaults that are written, a run on a CPU."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helios_jax.benchmarks import gpu_page, gpu_phases, gpu_report
from helios_jax.benchmarks.gpu_report import Phase
from helios_jax.models.ops import choices
from pallas_kernels.core import tiles
from pallas_kernels.tools.tunable import add_line

H100 = "NVIDIA H100 80GB HBM3"
DEVICE = {
    "phase": "machine",
    "what": "device",
    "device": H100,
    "platform": "gpu",
    "python": "3.12.3",
    "processor": "an abacus",
    "versions": {"jax": "0.11.2"},
    "memory_gib": 78.0,
}


def block(attention: str, norms: str, noisy: int, seconds: float, apart: float = 0.01) -> dict:
    return {
        "phase": "blocks", "attention": attention, "norms": norms, "noisy": noisy, "tokens": noisy + 2400,
        "seconds": seconds, "from_first_pair": apart,
    }  # fmt: skip


def check(op: str, dtype: str = "bfloat16", **result) -> dict:
    return {"phase": "check", "op": op, "dtype": dtype, "what": "2 x 333 tokens", **result}


def tune(op: str, block: int | None, seconds: float | None, why: str = "") -> dict:
    sizes = None if block is None else {"block": block}
    name = "xla" if sizes is None else f"block={block}"
    return {"phase": "tune", "op": op, "length": 11040, "name": name, "sizes": sizes, "seconds": seconds, "why": why}


BLOCKS = [
    block("cudnn", "xla", 8640, 0.015),
    block("cudnn", "xla", 540, 0.005),
    block("cudnn", "pallas", 8640, 0.014),
    block("cudnn", "pallas", 540, 0.0049),
    block("pallas", "xla", 8640, 0.001, apart=0.6),  # fast and wrong
    block("pallas", "pallas", 8640, 0.011),  # a level is missing
]


def test_the_fastest_pair_is_right_and_has_all_levels():
    found = gpu_page.conclusions([DEVICE, *BLOCKS])
    assert found.implementations == {"attention": "cudnn", "norms": "pallas"}
    assert found.device == H100


def test_blocks_that_were_timed_in_turn_take_the_place_of_earlier_ones():
    in_turn = [block("cudnn", "xla", 8640, 0.010), block("cudnn", "xla", 540, 0.004)]
    assert gpu_page.conclusions([DEVICE, *BLOCKS, *in_turn]).implementations["norms"] == "xla"
    text = gpu_page.page([DEVICE, *BLOCKS, *in_turn], "14b")
    assert "| 540 | 2940 | cudnn | xla | 0.004 |" in text
    assert "| 540 | 2940 | cudnn | xla | 0.005 |" not in text


@pytest.mark.parametrize("result", [{"verdict": "wrong"}, {"verdict": "moves"}, {"why": "no answer in 45 s"}])
def test_kernels_that_are_not_right_are_no_choice(result):
    rows = [DEVICE, *BLOCKS, check("adaln", **result)]
    found = gpu_page.conclusions(rows)
    assert found.implementations == {"attention": "cudnn", "norms": "xla"}
    assert found.wrong == [f"adaln, bfloat16, 2 x 333 tokens: {next(iter(result.values()))}"]
    only_float32 = gpu_page.conclusions([DEVICE, *BLOCKS, check("adaln", "float32", **result)])
    assert only_float32.implementations["norms"] == "pallas"
    assert len(only_float32.wrong) == 1


@pytest.mark.parametrize(
    ("row", "checked"),
    [
        ("ended after 75 s", [check("adaln", verdict="ok")]),
        ("no time was left", []),
        ("exit code 1: no worker process could be started", []),
    ],
)
def test_a_check_that_did_not_end_proves_nothing(row, checked):
    unfinished = {"phase": "phases", "what": "check adaln", "seconds": 75.0, "why": row}
    found = gpu_page.conclusions([DEVICE, *BLOCKS, *checked, unfinished])
    assert found.implementations["norms"] == "xla"
    wrong = [check("adaln", verdict="ok"), check("adaln", "float32", verdict="wrong")]
    done = unfinished | {"why": "exit code 1: 1 are not right"}
    assert gpu_page.conclusions([DEVICE, *BLOCKS, *wrong, done]).implementations["norms"] == "pallas"


def test_tiles_are_those_of_the_fastest_kernel():
    rows = [tune("adaln", None, 1e-6), tune("adaln", 4, None, "wrong"), tune("adaln", 8, 2e-5), tune("adaln", 2, 3e-5)]
    assert gpu_page.conclusions(rows).sizes == {"adaln": (11040, {"block": 8})}
    assert gpu_page.conclusions(rows[:2]).sizes == {}


def test_the_page_has_every_row_and_ends_with_what_to_change():
    rows = [DEVICE, *BLOCKS, check("adaln", error=0.003, moved=0.0, verdict="ok"), tune("adaln", 8, 2e-5)]
    text = gpu_page.page(rows, "14b")
    assert text.startswith(f"# GPU report: 14b on {H100}\n")
    assert "| 8640 | 11040 | cudnn | pallas | 0.014 | 0.01 |" in text
    assert "| adaln | bfloat16 | 2 x 333 tokens | 0.003 | 0 | ok |" in text
    assert text.splitlines()[-3:] == [
        "",
        "- fastest: attention by cudnn, norms by pallas",
        "- tiles of adaln up to 11040 tokens: block=8",
    ]
    assert "- nothing: no kernel ran here" in gpu_page.page([], "tiny")


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module that a phase can run: its text goes in, its name comes out."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def make(text: str) -> str:
        (tmp_path / "a_phase.py").write_text(text)
        return "a_phase"

    return make


def test_a_phase_that_hangs_ends_with_all_that_it_started(module, tmp_path):
    child = "import subprocess, sys, time; c = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    name = module(f"{child}; open({str(tmp_path / 'pid')!r}, 'w').write(str(c.pid)); print('begun'); time.sleep(60)")
    row = gpu_report.run(Phase("slow", name, (), 9), 3, tmp_path / "log")
    assert row["why"] == "ended after 3 s"
    assert 3 <= row["seconds"] < 20
    assert "begun" in (tmp_path / "log").read_text()
    pid = (tmp_path / "pid").read_text()
    stat = Path(f"/proc/{pid}/stat")
    for _ in range(50):  # killed: gone, or a zombie that nobody has asked for
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("what the phase started goes on")


def test_a_phase_that_fails_says_its_last_line(module, tmp_path):
    name = module("raise SystemExit('no such device')")
    row = gpu_report.run(Phase("broken", name, (), 9), 30, tmp_path / "log")
    assert row["why"] == "exit code 1: no such device"


def test_half_a_line_of_a_killed_process_is_left_out(tmp_path):
    rows = tmp_path / "rows.jsonl"
    assert gpu_report.read(rows) == []
    rows.write_text(json.dumps(DEVICE) + '\n{"phase": "bl')
    assert gpu_report.read(rows) == [DEVICE]
    add_line(rows, BLOCKS[0])
    assert gpu_report.read(rows) == [DEVICE, BLOCKS[0]]


def test_the_device_is_left_to_the_phases():
    """A machine without any device: the report and `check` only plan what other processes run."""
    code = "from pathlib import Path; from helios_jax.benchmarks import gpu_report; "
    code += "print(len(gpu_report.phases('14b', Path('rows'))), end='')"
    environment = {**os.environ, "JAX_PLATFORMS": "nowhere"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout == "15"  # four ops are checked and tuned, and seven phases measure


def test_a_choice_that_a_phase_does_not_have_is_refused(capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        gpu_phases.main(["machine", "--size", "tiny", "--rows", str(tmp_path / "rows"), "--norms", "xla"])
    assert end.value.code == 2
    assert "are of end_to_end, profile and reference: leave them out of machine" in capsys.readouterr().err


def test_a_report_becomes_the_devices_defaults(tmp_path, monkeypatch, capsys):
    for table in (choices, tiles):
        path = tmp_path / table.PATH.name
        path.write_text(table.PATH.read_text())
        monkeypatch.setattr(table, "PATH", path)
    report = tmp_path / "report.json"
    report.write_text(json.dumps([DEVICE, *BLOCKS, tune("adaln", 8, 2e-5)]))
    assert gpu_report.main(["--apply", str(report)]) == 0
    assert json.loads((tmp_path / "choices.json").read_text())["norms"][H100] == "pallas"
    assert json.loads((tmp_path / "tiles.json").read_text())["adaln"][H100] == {"11040": {"block": 8}}
    choices._table.cache_clear()
    tiles.table.cache_clear()

    report.write_text(json.dumps([DEVICE | {"platform": "cpu"}]))
    assert gpu_report.main(["--apply", str(report)]) == 2
    assert "no accelerator was measured" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        gpu_report.main(["--apply", str(tmp_path / "none.json")])
    assert end.value.code == 2


@pytest.mark.slow
@pytest.mark.heavy
def test_it_runs_on_a_cpu(tmp_path, capsys):
    asked = ["--size", "tiny", "--out", str(tmp_path), "--minutes", "5", "--only", "machine", "check", "blocks", "vae"]
    assert gpu_report.main([*asked, "end_to_end"]) == 0
    (page,), (data,) = tmp_path.glob("*.md"), tmp_path.glob("*.json")
    assert page.stem.endswith("-machine-check-blocks-vae-end_to_end"), "a part takes the place of a whole report"
    rows = json.loads(data.read_text())
    ended = {row["what"]: row["why"] for row in rows if row["phase"] == "phases"}
    assert [name for name, why in ended.items() if not why] == ["machine", "blocks", "end_to_end", "vae"]
    assert ended["check adaln"].endswith("there is nothing to check on a CPU: kernels run on GPUs and TPUs")
    assert {row["noisy"] for row in rows if row["phase"] == "blocks"} == {9, 36, 144}
    (video,) = (row for row in rows if row.get("what") == "8 chunks, 2+2+2")
    assert video["frames_per_s"] == pytest.approx(33 / video["seconds_a_chunk"])
    assert page.read_text() in capsys.readouterr().out


def test_what_makes_no_sense_is_refused(capsys, tmp_path):
    rows = tmp_path / "gpu-report-rows.jsonl"
    rows.write_text("{}")
    for arguments, line in (
        (["--only", "checks"], "there is no phase 'checks'; there are blocks, check, "),
        (["--minutes", "0"], "--minutes must be at least 1"),
    ):
        with pytest.raises(SystemExit) as end:
            gpu_report.main([*arguments, "--out", str(tmp_path)])
        assert end.value.code == 2
        assert line in capsys.readouterr().err
        assert rows.read_text() == "{}", "an earlier run's rows are gone"


def test_the_pace_is_that_between_chunks():
    pace = gpu_phases._pace([3.0, 4.0, 5.0, 6.0, 6.5], 33)  # the first waits for text, the last for no other
    assert (pace["seconds_a_chunk"], pace["frames_per_s"]) == (1.0, 33.0)
    assert pace["frames_per_s_in_all"] == pytest.approx(165 / 6.5)
