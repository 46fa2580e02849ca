"""The wheel: what a checkout offers works from any folder, too."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROBE = """
import json, os, sys
from helios_jax import config, pretrained
from helios_jax.sampling.options import SampleConfig
from helios_jax.training.stage_table import load_config

error = ""
try:
    config.find("toy/sampel")
except config.ConfigError as e:
    error = str(e)
loaded = config.load("toy/sample", [], SampleConfig)
print(json.dumps({
    "found": [str(config.find(name)) for name in ("configs/toy/sample.yaml", "toy/sample.yaml", "toy/sample")],
    "base": str(config.find("configs/released/stage1_init.yaml")),
    "model": str(pretrained.resolve(loaded.model)),
    "subfolders": pretrained.subfolders(loaded.model),
    "stage": load_config("toy/vae").stage,
    "error": error,
}))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the wheel's contents, as `pip install --no-deps --target` leaves it."""
    pytest.importorskip("setuptools", reason="builds a wheel; environments of Python 3.12 begin without setuptools")
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    source.mkdir()
    files = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True)
    names = files.stdout.decode().split("\0") if files.returncode == 0 else []
    if not names:
        pytest.skip("no git checkout to build from")
    for name in names:  # a copy: setuptools writes beside what it builds
        if name.startswith(("helios_jax/", "pallas_kernels/", "configs/")) or "/" not in name:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_file():
                (source / name).write_bytes((ROOT / name).read_bytes())
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", build, str(folder)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


def test_the_wheel_holds_all_that_is_needed(installed):
    def files(root: Path) -> set[str]:
        return {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file() and "__pycache__" not in p.parts}

    for name in ("helios_jax", "pallas_kernels"):
        packaged = {f for f in files(installed / name) if not f.startswith("configs/")}
        assert packaged == files(ROOT / name)
    assert files(installed / "helios_jax" / "configs") == files(ROOT / "configs")
    top = {p.name for p in installed.iterdir() if not p.name.endswith(".dist-info")}
    assert top == {"helios_jax", "pallas_kernels"}
    (scripts,) = installed.glob("*.dist-info/entry_points.txt")
    assert {"helios-sample", "helios-train"} <= set(scripts.read_text().replace("=", " ").split())


def test_configs_and_the_embedded_model_are_found_from_any_folder(installed, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", PROBE], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    got = json.loads(done.stdout)
    package = installed / "helios_jax"
    assert set(got["found"]) == {str(package / "configs" / "toy" / "sample.yaml")}
    assert got["base"] == str(package / "configs" / "released" / "stage1_init.yaml")
    assert got["model"] == str(package / "assets" / "toy_distilled")
    assert "transformer" in got["subfolders"]
    assert got["stage"] == "vae"
    assert got["error"].startswith("toy/sampel: no such file; did you mean toy/sample.yaml")


def test_what_lies_here_comes_first(tmp_path, monkeypatch):
    from helios_jax import config, pretrained

    monkeypatch.chdir(tmp_path)
    mine, model = Path("toy/sample.yaml"), Path("helios_jax/assets/toy")
    assert config.find(mine) == ROOT / "configs" / mine
    assert pretrained.local(model) == ROOT / model
    mine.parent.mkdir()
    mine.write_text("{}")
    model.mkdir(parents=True)
    assert config.find(mine) == mine
    assert pretrained.local(model) == model
    assert pretrained.local("runs/none") == Path("runs/none")
