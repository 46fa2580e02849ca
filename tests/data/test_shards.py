"""Datasets that take long: however often the writer dies and however many share the work, the result is the same."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helios_jax.data import records, shards
from helios_jax.data.shards import Build, Rejected

FEATURES = {"x": records.tensor((None, 2), np.float16), "id": records.text()}


def make(items):
    """An item n gives n % 3 examples; every seventh is broken."""
    for n in items:
        if n % 7 == 3:
            yield Rejected(f"item {n}", "is broken")
        else:
            yield [{"x": np.full((n % 2 + 1, 2), n, np.float16), "id": f"{n}.{i}"} for i in range(n % 3)]


def expected(items) -> list[str]:
    return [f"{n}.{i}" for n in items if n % 7 != 3 for i in range(n % 3)]


def begin(out: Path, num: int = 20, size: int = 3, host: int = 0, hosts: int = 1, settings=None) -> Build:
    # Two buckets, and a second split.
    train = {"8x4": range(0, num, 2), "4x8": range(1, num, 2)}
    plan = [*shards.plan("train", train, size), *shards.plan("test", {"": range(100, 105)}, size)]
    return Build(
        out, FEATURES, plan, settings or {"vae": "a"}, rejected=[Rejected("z", "no file")], host=host, hosts=hosts
    )


def run(build: Build, make=make) -> None:
    shards.run(build, make, "items")


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run without interruption writes."""
    out = tmp_path_factory.mktemp("whole") / "data"
    run(begin(out))
    return out


def test_dataset_holds_the_examples_of_its_items_by_bucket(whole):
    source = records.open_source(whole, "train")
    order = [*range(1, 20, 2), *range(0, 20, 2)]  # 4x8 before 8x4
    assert [example["id"] for example in source] == expected(order)
    sizes = [len(expected(range(1, 20, 2))), len(expected(range(0, 20, 2)))]
    assert source.buckets == {"4x8": range(sizes[0]), "8x4": range(sizes[0], sum(sizes))}
    assert [example["id"] for example in records.open_source(whole, "test")] == expected(range(100, 105))
    refused = [json.loads(line) for line in (whole / shards.REJECTED).read_text().splitlines()]
    assert [r["id"] for r in refused] == ["z", "item 3", "item 17", "item 10", "item 101"]
    assert refused[1] == {"id": "item 3", "reason": "is broken"}


@given(deaths=st.lists(st.integers(0, 24), max_size=4))
@settings(max_examples=12, deadline=None)
def test_interrupted_run_gives_the_same_dataset(tmp_path_factory, whole, deaths):
    out = tmp_path_factory.mktemp("died") / "data"
    made = 0

    def until(death):
        def mortal(items):
            nonlocal made
            for result in make(items):
                if made >= death:
                    raise KeyboardInterrupt
                made += 1
                yield result

        return mortal

    for death in deaths:
        made = 0
        try:
            run(begin(out), until(death))
            break
        except KeyboardInterrupt:
            assert not out.exists()
            with pytest.raises(FileNotFoundError, match="is not finished"):
                records.open_source(out, "train")
    if not out.exists():
        run(begin(out))
    assert content(out) == content(whole)
    assert [p.name for p in out.parent.iterdir()] == ["data"]


def test_no_shard_is_made_twice(tmp_path):
    seen = []

    def once(items):
        for n, result in zip(items, make(items)):
            if n == 9 and n not in seen:
                seen.append(n)
                raise KeyboardInterrupt
            seen.append(n)
            yield result

    with pytest.raises(KeyboardInterrupt):
        run(begin(tmp_path / "data"), once)
    done = list(seen)
    run(begin(tmp_path / "data"), once)
    again = seen[len(done) :]
    assert sorted({*done, *again}) == [*range(20), *range(100, 105)]
    assert set(done) & set(again) == {7, 9}  # of the shard (7, 9, 11) that was under way


def test_killed_process_loses_at_most_one_shard(tmp_path, whole):
    code = f"""
import sys, time
from pathlib import Path
from tests.data.test_shards import begin, make, run
def slow(items):
    for result in make(items):
        yield result
        if 0 in items: print("writing", flush=True), time.sleep(60)
run(begin(Path({str(tmp_path / "data")!r})), slow)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    build = begin(tmp_path / "data")
    assert [shard.items for shard in build.pending][:2] == [(0, 2, 4), (6, 8, 10)]
    run(build)
    assert content(tmp_path / "data") == content(whole)


@given(order=st.permutations(range(3)))
@settings(max_examples=4, deadline=None)
def test_several_hosts_make_the_same_dataset_as_one(tmp_path_factory, whole, order):
    out = tmp_path_factory.mktemp("hosts") / "data"
    for host in order[:-1]:
        run(begin(out, host=host, hosts=3))
        assert not out.exists()
    run(begin(out, host=order[-1], hosts=3))
    assert content(out) == content(whole)


def test_hosts_without_a_common_disk_bring_their_shards_together(tmp_path, whole, capsys):
    for host in (0, 1):
        run(begin(tmp_path / str(host) / "data", host=host, hosts=2))
        assert "shards of other hosts are missing" in capsys.readouterr().out
    partial = records.partial_folder(tmp_path / "0" / "data")
    for path in records.partial_folder(tmp_path / "1" / "data").rglob("*"):
        if path.is_file():
            (partial / path.relative_to(tmp_path / "1" / "data.partial")).write_bytes(path.read_bytes())
    run(begin(tmp_path / "0" / "data"), None)  # nothing is left to make
    assert content(tmp_path / "0" / "data") == content(whole)


def test_two_hosts_may_finish_at_once(tmp_path):
    first, second = (begin(tmp_path / "data", host=host, hosts=2) for host in (0, 1))
    for build in (first, second):
        for shard in build.pending:
            build.write(shard, make(shard.items), lambda: None)
    assert first.finish() is not None
    assert second.finish() is None


def test_changed_shard_is_made_again(tmp_path, whole):
    build = begin(tmp_path / "data")
    for shard in build.pending:
        build.write(shard, make(shard.items), lambda: None)
    path = next(build.folder.glob("data-train.array_record-00002-of-*"))
    path.write_bytes(path.read_bytes()[:1000])
    again = begin(tmp_path / "data")
    assert [shard.name for shard in again.pending] == ["train-00002"]
    run(again)
    assert content(tmp_path / "data") == content(whole)


def test_other_arguments_do_not_continue_an_unfinished_dataset(tmp_path):
    begin(tmp_path / "data")
    for change, what in (
        ({"settings": {"vae": "b"}}, "vae"), ({"num": 21}, "items"), ({"size": 4}, "shards"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"was begun with other .*{what}") as error:
            begin(tmp_path / "data", **change)
        assert "\n" not in str(error.value)
    begin(tmp_path / "data", host=1, hosts=3)  # the shares may change


def test_existing_and_empty_datasets_are_refused(tmp_path, whole):
    with pytest.raises(FileExistsError, match="never overwritten"):
        begin(whole, num=21)
    assert begin(whole).complete
    with pytest.raises(ValueError, match="nothing to make, 1 items were refused; the first: a: is broken"):
        Build(tmp_path / "data", FEATURES, [], {}, rejected=[Rejected("a", "is broken")])
    build = Build(tmp_path / "data", FEATURES, shards.plan("train", {"": [3, 10]}, 1), {})
    with pytest.raises(ValueError, match="no item of train could be used; 2 refused: item 3: is broken"):
        run(build)


def test_shards_under_a_name_that_tfds_refuses_are_not_made_again(tmp_path):
    """Older versions named them so, and failed when all were done."""
    build = begin(tmp_path / "384x640")
    for shard in build.shards:
        build.write(shard, make(shard.items), lambda: None)
        path = build._path(shard)
        path.rename(path.with_name(path.name.replace("dataset_384x640-", "384x640-")))
    again = begin(tmp_path / "384x640")
    assert not again.pending
    run(again)
    assert [example["id"] for example in records.open_source(tmp_path / "384x640", "test")] == expected(range(100, 105))


def test_a_refused_item_may_have_any_name(tmp_path):
    plan = shards.plan("train", {"": range(3)}, 3)
    run(Build(tmp_path / "data", FEATURES, plan, {}, rejected=[Rejected("é\ud83d", "no file")]))
    assert "é\\ud83d" in (tmp_path / "data" / shards.REJECTED).read_text("utf-8")
    assert json.loads((tmp_path / "data" / shards.REJECTED).read_text("utf-8"))["id"] == "é\ud83d"


def test_progress_and_final_figures_are_printed(tmp_path, capsys, monkeypatch):
    shards.run(begin(tmp_path / "data"), make, "clips", every=0.0)
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert "1/25 clips" in lines[0]
    assert "clips/s" in lines[0]
    assert "left" in lines[0]
    assert "25/25 clips" in lines[-2]
    assert "records" in lines[-1]
    assert "5 clips skipped (rejected.jsonl)" in lines[-1]
    assert "skipped item 3: is broken" in err
