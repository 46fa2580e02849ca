"""The short table of the toy from its data to its page, with a few steps where its own have hundreds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT, environment

SHORT = {
    '"400"': '"2"',
    "num_inference_steps=20": "num_inference_steps=1 --videos 2 --chunks 2",
    "checkpoint.every=200": "",
}


def python(folder: Path, *arguments: object) -> str:
    command = [sys.executable, *map(str, arguments)]
    ended = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.mark.heavy
def test_the_quick_table_from_data_to_page(tmp_path):
    for name in ("train.py", "configs", "helios_jax"):  # the table names files of the checkout
        (tmp_path / name).symlink_to(ROOT / name)
    python(tmp_path, "-m", "helios_jax.toy.build", "--out", "data/toy", "--videos", 16, "--chunks", 2)
    toy = "helios_jax/assets/toy"
    python(tmp_path, "-m", "helios_jax.precompute", "--videos", "data/toy", "--vae", f"{toy}/vae", "--text", toy,
           "--out", "data/toy-latents")  # fmt: skip
    table = (ROOT / "configs/ablations/quick.yaml").read_text()
    for long, short in SHORT.items():
        assert long in table
        table = table.replace(long, short)
    (tmp_path / "table.yaml").write_text(table)
    printed = python(tmp_path, "-m", "helios_jax.ablations", "table.yaml", "--out", "out", "--parallel", 2)
    page, found = (tmp_path / "out/page.md").read_text(), json.loads((tmp_path / "out/page.json").read_text())
    for text in (printed, page):
        assert "The first-frame anchor keeps colours" in text
    assert set(found["rows"]) == {"full", "absolute positions", "no anchor", "no corruption"}
    assert (tmp_path / "out/page-curves.png").is_file()
    again = python(tmp_path, "-m", "helios_jax.ablations", "table.yaml", "--out", "out", "--parallel", 2)
    assert "8 jobs, 0 of them to do" in again
