"""Data, runs, models and videos in a bucket: every command with gs:// paths, and no local folder that is called so."""

import json
import os
from pathlib import Path

import pytest
import yaml
from orbax.checkpoint._src.path import gcs_utils

import train
from helios_jax import locations
from helios_jax.locations import LocationError, location
from tests import bucket
from tests.training.test_loop import BASE


@pytest.fixture(scope="module", autouse=True)
def server():
    with bucket.serve() as address, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", address)  # read once, when the first array is
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
        # Orbax asks Google's own client whether folders of this bucket are real ones.
        patch.setattr(gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False)
        bucket.register()
        yield


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty bucket, and a working folder in which nothing may appear."""
    bucket.OBJECTS.clear()
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    yield folder
    assert not list(folder.iterdir())
    assert not os.path.exists("/gs")


def names(begin: str) -> list[str]:
    return sorted(name.removeprefix(f"{begin}/") for name in bucket.OBJECTS if name.startswith(begin))


def test_local_text_is_a_pathlib_path():
    assert type(location("runs/x")) is type(Path("runs/x"))
    assert location("take:1.mp4") == Path("take:1.mp4")


@pytest.mark.parametrize("text", ["htp://bucket/x", "gs:/bucket/x", "gs://", "GS://bucket/x", "file:/x"])
def test_unknown_scheme_is_one_line(text):
    with pytest.raises(LocationError, match=r"gs://BUCKET/NAME") as error:
        location(text)
    assert text in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_package_is_named():
    with pytest.raises(LocationError, match="pip install adlfs"):
        location("az://bucket/x")


def test_bucket_path_is_used_as_pathlibs():
    path = location("gs://bucket/folder/a.txt")
    assert str(path.parent / "b") == "gs://bucket/folder/b"
    path.write_text("é\n")
    assert path.read_text(encoding="utf-8-sig") == "é\n"
    assert path.stat().st_size == 3
    assert path.is_file()
    assert path.parent.is_dir()
    assert [file.name for file in path.parent.glob("*.txt")] == ["a.txt"]
    with path.open("rb", buffering=0) as file:
        file.seek(1)
        assert file.read(1) == b"\xa9"
    with pytest.raises(OSError, match="whole"):
        path.open("a")
    path.parent.rename(path.parent.with_name("other"))
    assert names("bucket") == ["other/a.txt"]


def test_errors_of_the_service_become_one_oserror(monkeypatch):
    class HttpError(Exception):
        pass

    def fail(*_, **__):
        raise HttpError("Anonymous caller does not\nhave access")

    monkeypatch.setattr(bucket.Bucket, "_open", fail)
    with pytest.raises(OSError, match="Anonymous caller does not have access"):
        location("gs://bucket/a").write_text("x")


def test_replacing_uploads_at_the_end_only(here):
    path = location("gs://bucket/a.txt")
    with pytest.raises(OSError, match="stop"), locations.replacing(path) as part:  # noqa: PT012
        part.write_text("half")
        raise OSError(5, "stop")
    assert not bucket.OBJECTS
    with locations.replacing(path) as part:
        part.write_text("whole")
    assert path.read_text() == "whole"


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
    assert len(names("bucket/runs/a/tensorboard")) == 2
    steps = {name.partition("/")[0] for name in names("bucket/runs/a/checkpoints")}
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
    assert "8.damaged" in {name.partition("/")[0] for name in names("bucket/run/checkpoints")}


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
