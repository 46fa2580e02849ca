"""Repositories of the hub, by name, from a server that speaks as the hub does, and from the cache when it is gone."""

import subprocess
import sys
from pathlib import Path

from safetensors.numpy import save_file

from helios_jax.heliosbench import model_files
from tests import fake_hub
from tests.processes import ROOT, environment
from tests.tiny_lora import ARRAYS

LOAD = """
from helios_jax import HeliosPipeline, lora
lora.attach(HeliosPipeline.from_pretrained("owner/tiny").transformer, {"style": "owner/style"})
"""


def python(settings, *arguments):
    """Runs Python with the hub of `settings`; returns its exit code and what it printed."""
    surroundings = environment() | settings
    ended = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=surroundings, capture_output=True, text=True)
    return ended.returncode, ended.stdout + ended.stderr


def test_a_pipeline_and_a_lora_by_name(folder, config, tmp_path):
    style, cache = tmp_path / "style", tmp_path / "cache"
    style.mkdir()
    save_file(ARRAYS, style / "style.safetensors")
    command = ["sample.py", str(config), "--model", "owner/tiny", "--num-frames", "5"]
    with fake_hub.serve({"owner/tiny": folder, "owner/style": style}, cache) as hub:
        code, printed = python(hub, *command, "--lora", "owner/style=0.5")
        assert code == 0, printed
    # The server is gone, and nothing waits for it.
    code, printed = python(hub, "-c", LOAD)
    assert code == 0, printed
    assert "Retrying" not in printed


def test_weights_of_heliosbench_by_name(tmp_path):
    weights = tmp_path / "weights"
    for stem in (model_files.CLIP, model_files.HEAD):
        (weights / stem).parent.mkdir(parents=True, exist_ok=True)
        (weights / f"{stem}.safetensors").write_bytes(stem.encode())
    program = (
        "from helios_jax.heliosbench import model_files as m; print(m.find(m.open_folder('owner/weights'), m.HEAD))"
    )
    with fake_hub.serve({"owner/weights": weights}, tmp_path / "cache") as hub:
        code, printed = python(hub, "-c", program)
    assert code == 0, printed
    assert Path(printed.splitlines()[0]).read_bytes() == model_files.HEAD.encode()
