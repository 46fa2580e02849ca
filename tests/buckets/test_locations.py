"""Names of places: a path of a bucket is used as a local one, and no local folder is called gs:."""

import pickle
from pathlib import Path

import pytest

from helios_jax import locations
from helios_jax.locations import LocationError, location
from tests.buckets import bucket


def test_local_text_is_a_pathlib_path():
    assert type(location("runs/x")) is type(Path("runs/x"))
    assert location("take:1.mp4") == Path("take:1.mp4")
    assert location("take:/1.mp4") == Path("take:/1.mp4")


@pytest.mark.parametrize(
    "text", ["htp://bucket/x", "gs:/bucket/x", "gs://", "GS://bucket/x", "gs://bucket", "file:///x"]
)
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
    assert bucket.names("bucket") == ["other/a.txt"]
    assert str(path.relative_to(path.parents[1])) == "folder/a.txt"
    assert pickle.loads(pickle.dumps(path)) == path == location(f"{path.parent}/a.txt")
    assert [str(parent) for parent in path.parents][:3] == ["gs://bucket/folder", "gs://bucket", "gs://"]


@pytest.mark.parametrize("local", [Path, lambda path: Path("runs") / path, lambda path: Path("runs", path)])
def test_a_bucket_path_is_no_local_one(local):
    path = local(location("gs://bucket/folder/a.txt"))
    for use in (lambda: path.write_text("x"), path.read_text, lambda: path.parent.mkdir(parents=True)):
        with pytest.raises(NotADirectoryError, match="gs/bucket/folder"):
            use()


@pytest.mark.parametrize("where", ["_open", "close", "info"])
def test_errors_of_the_service_become_one_oserror(monkeypatch, where):
    class HttpError(Exception):
        pass

    def fail(*_, **__):
        raise HttpError("Anonymous caller does not\nhave access")

    monkeypatch.setattr(bucket.Upload if where == "close" else bucket.Bucket, where, fail)
    path = location("gs://bucket/a")
    with pytest.raises(OSError, match="Anonymous caller does not have access") as error:  # noqa: PT012
        path.write_text("x")
        path.stat()
    assert error.value.filename == "gs://bucket/a"


def test_replacing_uploads_at_the_end_only(here):
    path = location("gs://bucket/a.txt")
    with pytest.raises(OSError, match="stop"), locations.replacing(path) as part:  # noqa: PT012
        part.write_text("half")
        raise OSError(5, "stop")
    # Only this name counts: a file of another test, whose upload failed, may be closed again when it is collected.
    assert "bucket/a.txt" not in bucket.OBJECTS
    with locations.replacing(path) as part:
        part.write_text("whole")
    assert path.read_text() == "whole"
