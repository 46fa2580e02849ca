"""Datasets in a bucket, and the local copies of their files."""

import json
import pickle

import numpy as np
import pytest

from helios_jax import locations
from helios_jax.data import records
from helios_jax.data.loader import loader
from helios_jax.locations import location
from helios_jax.media.mp4 import VideoWriter
from helios_jax.precompute import cli as precompute
from tests.buckets import bucket
from tests.data import test_shards


def whole(folder) -> dict[str, list]:
    return {split: [example["id"] for example in records.open_source(folder, split)] for split in ("train", "test")}


def test_dataset_made_in_a_bucket_equals_a_local_one(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = location("gs://bucket/data")
    test_shards.run(test_shards.begin(tmp_path / "data"))
    first = test_shards.begin(out, host=0, hosts=2)
    test_shards.run(first)
    with pytest.raises(FileNotFoundError, match="is not finished"):
        records.open_source(out, "train")
    test_shards.run(test_shards.begin(out, host=1, hosts=2))
    assert bucket.names("bucket/data") == sorted(test_shards.content(tmp_path / "data"))
    assert whole(out) == whole(tmp_path / "data")
    assert test_shards.begin(out).complete
    with pytest.raises(FileExistsError, match="gs://bucket/data already exists"):
        test_shards.begin(out, num=21)


def test_shard_is_copied_when_its_first_record_is_asked_for_and_once(tmp_path, monkeypatch):
    features = {"x": records.tensor((None,), np.uint8), "id": records.text()}
    examples = [{"x": np.arange(i, dtype=np.uint8), "id": str(i)} for i in range(6)]
    records.write("gs://bucket/data", features, {"train": examples}, shard_bytes=60)
    reads, opened = [], bucket.Bucket._open

    def tell(self, path, mode="rb", **options):
        reads.append(path)
        return opened(self, path, mode, **options)

    monkeypatch.setattr(bucket.Bucket, "_open", tell)

    def shards_read() -> list[str]:
        return [path for path in reads if "array_record" in path]

    source = records.open_source("gs://bucket/data", "train", cache=tmp_path / "cache")
    assert not shards_read()
    assert source[1]["id"] == "1"
    assert len(shards_read()) == 1
    again = pickle.loads(pickle.dumps(source))
    assert [example["id"] for example in again] == [str(i) for i in range(6)]
    assert [example["id"] for example in source] == [str(i) for i in range(6)]
    count = len([name for name in bucket.OBJECTS if "array_record" in name])
    assert count > 1
    assert len(shards_read()) == count

    # A dataset that was made anew is copied anew, and one that is cut off is told.
    cut = min(name for name in bucket.OBJECTS if "array_record" in name)
    bucket.put(cut, bucket.OBJECTS[cut][1][:-7])
    with pytest.raises(records.RecordError, match="damaged"):
        records.open_source("gs://bucket/data", "train", cache=tmp_path / "cache")[0]
    monkeypatch.setattr(bucket.Bucket, "_open", opened)
    del bucket.OBJECTS[cut]
    with pytest.raises(ValueError, match="is missing"):
        records.open_source("gs://bucket/data", "train", cache=tmp_path / "cache")


def test_processes_that_read_share_the_copies(tmp_path, server):
    features = {"x": records.tensor((1,), np.uint8)}
    records.write("gs://bucket/data", features, {"train": [{"x": np.full(1, i, np.uint8)} for i in range(8)]})
    made = []
    for workers in (0, 2):
        cache = tmp_path / f"cache{workers}"
        source = records.open_source("gs://bucket/data", "train", cache=cache)
        batches = loader(bucket.Elsewhere(source, server), seed=0, batch_size=4, workers=workers)
        made.append([next(batches)["x"].tolist() for _ in range(3)])
        copies = [path.name for path in cache.rglob("*") if path.is_file() and not path.name.endswith(".lock")]
        assert len(copies) == len([name for name in bucket.names("bucket/data") if "array_record" in name])
    batches.close()
    assert made[0] == made[1]


def test_copy_that_fails_is_no_damaged_record(tmp_path):
    features = {"x": records.tensor((1,), np.uint8)}
    records.write("gs://bucket/data", features, {"train": [{"x": np.zeros(1, np.uint8)}]})
    (tmp_path / "cache").write_text("a file")
    source = records.open_source("gs://bucket/data", "train", cache=tmp_path / "cache")
    with pytest.raises(records.RecordError, match="cannot be copied to") as error:
        source[0]
    assert "damaged" not in str(error.value)


def test_clips_of_a_bucket_become_a_dataset_in_a_bucket(folder, tmp_path, capsys, monkeypatch):
    """The videos lie beside the list, at an address of their own, and nowhere."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    frames = np.random.default_rng(0).integers(0, 255, (10, 32, 48, 3), np.uint8)
    with VideoWriter(tmp_path / "v.mp4", 24, 32, 48) as video:
        video.write(frames)
    entries = [
        {"path": path, "cut": [0, 9], "crop": [0, 48, 0, 32], "fps": 24, "cap": "a cat"}
        for path in ("v.mp4", "gs://other/v.mp4", "absent.mp4")
    ]
    (tmp_path / "clips.json").write_text(json.dumps(entries))
    for name in ("bucket/clips.json", "bucket/v.mp4", "other/v.mp4"):
        locations.copy_file(tmp_path / name.partition("/")[2], location(f"gs://{name}"))
    command = ["clips", "--json", "gs://bucket/clips.json", "--model", str(folder), "--size", "32x48"]
    command += ["--chunk-frames", "9", "--min-frames", "9", "--out", "gs://bucket/latents"]
    assert precompute.main(command) == 0, capsys.readouterr().err
    source = records.open_source("gs://bucket/latents", "train")
    assert [example["id"] for example in source] == ["v_0-9", "gs:/other/v_0-9"]
    assert "gs://bucket/absent.mp4: no such file" in location("gs://bucket/latents/rejected.jsonl").read_text()
    assert precompute.main(command) == 0
    assert "gs://bucket/latents: is complete" in capsys.readouterr().out


@pytest.mark.parametrize("argument", ["--out", "--json"])
def test_bad_location_of_precompute_is_told(argument, capsys):
    given = {"--out": "x", "--json": "y", argument: "htp://b/x"}
    assert precompute.main(["clips", *[part for pair in given.items() for part in pair]]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "htp://b/x names no place" in line
