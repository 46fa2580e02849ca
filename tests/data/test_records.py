"""Datasets on disk: what is written is read back, in order, and an unfinished folder never looks complete."""

import os
import signal
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helios_jax.data import records
from helios_jax.toy import build as toy_build
from helios_jax.toy import world as toy

FEATURES = {"x": records.tensor((None, 2), np.float16), "name": records.text()}


def example(i: int) -> records.Example:
    return {"x": np.full((i % 3 + 1, 2), i, np.float16), "name": f"№ {i}"}


@given(num=st.integers(1, 20), shard_bytes=st.sampled_from([1, 100, 2**20]))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_examples_keep_their_order_over_any_number_of_files(tmp_path_factory, num, shard_bytes):
    folder = tmp_path_factory.mktemp("records") / "My Data-1"
    records.write(folder, FEATURES, {"train": map(example, range(num))}, shard_bytes=shard_bytes)
    source = records.open_source(folder, "train")
    assert len(source) == num
    for i, got in enumerate(source):
        assert got["name"] == example(i)["name"]
        assert got["x"].dtype == np.float16
        np.testing.assert_array_equal(got["x"], example(i)["x"])
    files = len(list(folder.glob("*array_record*")))
    assert files == num if shard_bytes == 1 else 1 <= files <= num
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize(
    "name", ["384x640", "64", "_64", "été", "e\u0301te\u0301", "日本", "a²", "数据_64", "-", "x y{z}", "Ünï" * 30]
)
def test_a_folder_may_have_any_name(tmp_path, name):
    """TFDS takes few names for a dataset, and finds no file of one with another."""
    records.write(tmp_path / name, FEATURES, {"train": [example(0), example(1)]})
    assert len(records.open_source(tmp_path / name, "train")) == 2
    assert all(path.name.isascii() for path in (tmp_path / name).iterdir())


def test_a_link_is_refused_before_any_work(tmp_path):
    """A finished dataset takes its folder's place, but cannot take a link's."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    with pytest.raises(FileExistsError, match="link is a link or a disk"):
        records.write(tmp_path / "link", FEATURES, {"train": (1 / 0 for _ in range(1))})


def test_tensors_of_every_dtype_and_rank_survive(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.integers(0, 256, (3, 4, 5, 3)).astype(np.uint8),
        "b": rng.standard_normal((2, 9, 4, 4, 16)).astype(np.float32),
        "c": rng.standard_normal((7, 8)).astype(np.float16),
        "d": np.array(5, np.int64),
        "e": rng.standard_normal((2, 3)).astype(ml_dtypes.bfloat16).view(np.uint16),  # bfloat16 goes as its bits
    }
    features = {key: records.tensor(value.shape, value.dtype) for key, value in arrays.items()}
    features["b"] = records.tensor((None, 9, None, None, 16), np.float32)
    records.write(tmp_path / "d", features, {"train": [arrays]})
    (got,) = records.open_source(tmp_path / "d", "train")
    for key, value in arrays.items():
        assert got[key].dtype == value.dtype
        np.testing.assert_array_equal(got[key], value)


def test_errors_name_the_folder_the_rule_and_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing does not exist: .* name another folder"):
        records.open_source(tmp_path / "nothing", "train")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "features.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"half is not a complete dataset: .* make it with `make half`"):
        records.open_source(tmp_path / "half", "train", make="make half")
    folder = records.write(tmp_path / "d", FEATURES, {"train": [example(0)], "test": [example(1)]})
    with pytest.raises(ValueError, match="has no split 'valid': choose one of test, train"):
        records.open_source(folder, "valid")
    with pytest.raises(FileExistsError, match="never overwritten"):
        records.write(folder, FEATURES, {"train": [example(0)]})
    assert len(records.open_source(folder, "test")) == 1


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    def broken():
        yield example(0)
        raise RuntimeError("the camera broke")

    for examples, error in ((broken(), "camera"), ([], "split 'train' has no examples")):
        with pytest.raises((RuntimeError, ValueError), match=error):
            records.write(tmp_path / "d", FEATURES, {"train": examples})
    with pytest.raises(ValueError, match="float64"):
        records.write(tmp_path / "d", FEATURES, {"train": [{"x": np.zeros((1, 2)), "name": ""}]})
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_no_folder_that_looks_complete(tmp_path):
    code = f"""
import numpy as np
from helios_jax.data import records
def forever():
    i = 0
    while True:
        yield {{"x": np.zeros((1, 2), np.float16), "name": "n"}}
        i += 1
        if i == 100: print("writing", flush=True)
records.write({str(tmp_path / "d")!r}, {{"x": records.tensor((None, 2), np.float16), "name": records.text()}},
              {{"train": forever()}}, shard_bytes=1000)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ})
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "d").exists()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        records.open_source(tmp_path / "d", "train")
    records.write(tmp_path / "d", FEATURES, {"train": [example(0)]})  # and does not stand in the way


def test_the_toy_dataset_holds_renderings_of_its_scenes(tmp_path, capsys):
    toy_build.main(
        ["--out", str(tmp_path / "toy"), "--videos", "5", "--test-videos", "2", "--chunks", "2", "--seed", "7"]
    )
    assert "5 training and 2 test videos of 2 chunks" in capsys.readouterr().out
    for split, num in (("train", 5), ("test", 2)):
        source = records.open_source(tmp_path / "toy", split)
        assert len(source) == num
        for i, got in enumerate(source):
            scene = toy.sample_scene(7 * 10**9 + i, split)
            assert got["caption"] == toy.caption(scene)
            assert got["id"] == f"{split}-7-{i:06d}"
            np.testing.assert_array_equal(got["video"], toy.render(scene, 66))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--videos", "0"], "--videos is 0"), (["--seed", "-1"], "--seed is -1"), (["--chunks", "x"], "invalid int")],
)
def test_command_refuses_invalid_arguments(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as error:
        toy_build.main(["--out", str(tmp_path / "toy"), *arguments])
    assert error.value.code == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "mine").touch()
    with pytest.raises(SystemExit):
        toy_build.main(["--out", str(tmp_path / "toy"), "--videos", "1"])
    assert "already exists" in capsys.readouterr().err


def damaged(tmp_path, damage):
    """A dataset of files of two records, of 2 KB each, whose second file `damage` has changed."""
    rng = np.random.default_rng(0)
    examples = [{"x": rng.standard_normal((500, 2)).astype(np.float16), "name": f"№ {i}"} for i in range(9)]
    folder = records.write(tmp_path / "d", FEATURES, {"train": examples}, shard_bytes=5000)
    files = sorted(folder.glob("*array_record*"))
    content = bytearray(files[1].read_bytes())
    damage(files[1], content)
    if files[1].exists():
        files[1].write_bytes(content)
    return folder, files[1].name


def cut(count):
    return lambda path, content: content.__delitem__(slice(count, None))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path, content: path.unlink(), "is missing; copy the folder again"),
        (cut(0), "is damaged: ArrayRecord file should be at least 64KB big"),
        (cut(2**16), "is damaged: it ends early"),
        (cut(-100), "is damaged: "),
    ],
    ids=["missing", "empty", "half", "most"],
)
def test_a_file_that_is_not_whole_is_named_when_the_dataset_is_opened(tmp_path, damage, message):
    folder, name = damaged(tmp_path, damage)
    with pytest.raises(ValueError, match=f"{name} {message}") as error:
        records.open_source(folder, "train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json", records.BUCKETS])
def test_damaged_metadata_is_one_line(tmp_path, name):
    folder = records.write(tmp_path / "d", FEATURES, {"train": map(example, range(3))})
    (folder / name).write_text('{"train": [["8x8", 1')
    with pytest.raises(ValueError, match="d: its metadata is damaged: ") as error:
        records.open_source(folder, "train")
    assert "\n" not in str(error.value)
    (folder / name).write_text('{"train": [["8x8", 2]]}')
    with pytest.raises(
        ValueError, match=r"d: (its metadata is damaged|buckets\.json and dataset_info\.json give other)"
    ):
        records.open_source(folder, "train")


def test_a_damaged_record_is_named_and_can_be_left_out(tmp_path):
    def flip(path, content):
        content[3000] ^= 255  # in the second record

    folder, name = damaged(tmp_path, flip)
    source = records.open_source(folder, "train")
    with pytest.raises(records.RecordError) as error:
        source[3]
    message = str(error.value)
    assert "\n" not in message
    assert f"d[train]: record 3 (number 1 of {name}) is damaged: Corrupted" in message
    assert message.endswith("or leave it out with data.leave_out=[3]")
    assert [source[i]["name"] for i in range(9) if i != 3] == [f"№ {i}" for i in range(9) if i != 3]
    for left_out, instead in (([3], {3: 4}), ([3, 4, 8], {3: 5, 4: 5, 8: 0})):
        kept = records.open_source(folder, "train", leave_out=left_out)
        assert [x["name"] for x in kept] == [f"№ {instead.get(i, i)}" for i in range(9)]
    with pytest.raises(ValueError, match=r"leave_out: .*d\[train\] has no record 9, it has 0 to 8"):
        records.open_source(folder, "train", leave_out=[9])
    with pytest.raises(ValueError, match="nothing is left of records 0 to 8"):
        records.open_source(folder, "train", leave_out=range(9))


def test_a_file_of_another_dataset_is_named(tmp_path):
    """Whole, but with another number of records."""
    folder, name = damaged(tmp_path, lambda path, content: None)
    other = records.write(tmp_path / "other", FEATURES, {"train": map(example, range(5))})
    (folder / name).write_bytes(next(other.glob("*array_record*")).read_bytes())
    with pytest.raises(ValueError, match=f"{name} is damaged: it holds 5 records of 2"):
        records.open_source(folder, "train")
