"""Runs and compiled programs in a bucket."""

import json
import os
import subprocess
import sys

import pytest
import yaml

import train
from helios_jax.locations import location
from tests.buckets import bucket
from tests.training.test_loop import BASE


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(BASE))
    return path


def test_run_in_a_bucket_stops_and_goes_on_as_a_local_one(config, tmp_path, capfd):
    remote, local = "run=gs://bucket/runs/a", f"run={tmp_path}/local"
    validation = "validation={every: 4, prompts: [a]}"
    assert train.main([str(config), remote, validation, "steps=8"]) == 0
    assert train.main([str(config), remote, validation]) == 0
    assert "resumed at step 8 of gs://bucket/runs/a/checkpoints" in capfd.readouterr().out
    assert train.main([str(config), local, "steps=8"]) == 0
    assert train.main([str(config), local]) == 0

    lines = [json.loads(line) for line in location("gs://bucket/runs/a/metrics.jsonl").read_text().splitlines()]
    ours = [json.loads(line) for line in (tmp_path / "local/metrics.jsonl").read_text().splitlines()]
    assert {line["step"]: line["loss"] for line in ours}.items() <= {x["step"]: x["loss"] for x in lines}.items()
    assert yaml.safe_load(location("gs://bucket/runs/a/config.yaml").read_text())["run"] == "gs://bucket/runs/a"
    assert len(bucket.names("bucket/runs/a/tensorboard")) == 2
    steps = {name.partition("/")[0] for name in bucket.names("bucket/runs/a/checkpoints")}
    assert steps == {"8", "12"}


def test_damaged_checkpoint_in_a_bucket_is_set_aside(config, capfd):
    assert train.main([str(config), "run=gs://bucket/run", "steps=8"]) == 0
    state = [name for name in bucket.OBJECTS if name.startswith("bucket/run/checkpoints/8/state/")]
    for name in state:
        bucket.put(name, b"")
    assert train.main([str(config), "run=gs://bucket/run"]) == 0
    told = capfd.readouterr()
    assert "8.damaged" in told.err
    assert "resumed at step 4" in told.out
    assert "8.damaged" in {name.partition("/")[0] for name in bucket.names("bucket/run/checkpoints")}


def test_compilation_cache_in_an_unknown_place_is_one_line(config, monkeypatch, capfd):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "htp://bucket/cache")
    assert train.main([str(config)]) == 2
    told = capfd.readouterr().err
    assert told.count("\n") == 1
    assert "JAX_COMPILATION_CACHE_DIR: htp://bucket/cache names no place" in told


def test_compiled_programs_are_kept_in_a_bucket(monkeypatch):
    code = "import jax, jax.numpy as jnp\nfrom tests.buckets import bucket\nbucket.register()\n"
    code += "from helios_jax.runtime.compilation import enable_cache\nenable_cache()\n"
    code += (
        "jax.jit(lambda x: jnp.sin(x) + 1)(1.0)\nassert any(name.startswith('bucket/xla/') for name in bucket.OBJECTS)"
    )
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": "gs://bucket/xla", "JAX_PLATFORMS": "cpu"}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # this program takes no half second
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "override",
    ["run=htp://bucket/x", "data.folder=gs:/x", "checkpoint.folder=s3://b/x", "data.cache=gs://b/x", "init=htp://b/x"],
)
def test_bad_location_of_a_run_is_one_line(config, override, capfd, tmp_path):
    assert train.main([str(config), f"run={tmp_path}/run", override]) == 2
    told = capfd.readouterr().err
    assert told.count("\n") == 1
    assert override.partition("=")[0] in told
    assert override.partition("=")[2] in told
