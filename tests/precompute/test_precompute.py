"""The whole command on tiny networks: clips and prompts in, a dataset that training reads out."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helios_jax import pretrained
from helios_jax.data import records
from helios_jax.data.records import EMPTY_TEXT, NEGATIVE_TEXT
from helios_jax.media.mp4 import VideoWriter
from helios_jax.models.vae import normalize
from helios_jax.precompute import cli as precompute
from helios_jax.precompute import tasks
from helios_jax.precompute.clips import Selection, read_clip, read_lists
from helios_jax.sampling.checkpoint import Checkpoint
from tests import tiny
from tests.data.test_shards import content

SIZES = ["16x32", "32x16"]
OPTIONS = ["--size", *SIZES, "--chunk-frames", "9", "--min-frames", "9", "--shard-size", "2", "--seed", "1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Clips of two shapes and several lengths, two of them bad, and their list."""
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    entries = []
    for i in range(7):
        height, width = (16, 32) if i % 3 else (32, 16)
        frames = 9 * (i % 3) + 10
        with VideoWriter(folder / f"{i}.mp4", 24, height, width) as video:
            video.write(rng.integers(0, 256, (frames, height, width, 3)).astype(np.uint8))
        entries.append({"path": f"{i}.mp4", "cut": [0, frames], "crop": [0, width, 0, height], "cap": [f"a red {i}"]})
    (folder / "4.mp4").write_bytes((folder / "4.mp4").read_bytes()[:2000])
    (folder / "2.mp4").unlink()
    (folder / "list.json").write_text(json.dumps(entries))
    return folder


def run(folder, model, out, *more) -> int:
    arguments = ["clips", "--json", f"{folder}/list.json", "--model", str(model), "--out", str(out)]
    return precompute.main([*arguments, *OPTIONS, *more])


@pytest.fixture(scope="module")
def whole(tmp_path_factory, folder, model):
    out = tmp_path_factory.mktemp("whole") / "latents"
    assert run(folder, model, out) == 0
    return out


def test_good_clips_are_written_and_bad_ones_named(whole, folder):
    source = records.open_source(whole, "train")
    assert {key: len(x) for key, x in source.buckets.items()} == {"16x32": 2, "32x16": 3}
    got = {x["id"]: x for x in source}
    assert list(got) == ["1_0-19", "5_0-28", "0_0-10", "3_0-10", "6_0-10"]
    for i, chunks, size in ((0, 1, (4, 2)), (1, 2, (2, 4)), (5, 3, (2, 4))):
        example = next(x for name, x in got.items() if name.startswith(f"{i}_"))
        assert example["latents"].shape == (chunks, 3, *size, 4)
        assert example["latents"].dtype == np.float16
        assert example["caption"] == f"a red {i}"
    refused = [json.loads(line) for line in (whole / "rejected.jsonl").read_text().splitlines()]
    assert [r["id"] for r in refused] == ["2_0-28", "4_0-19"]
    assert "no such file" in refused[0]["reason"]


def test_latents_are_drawn_from_each_chunk_s_posterior(whole, folder, model, tmp_path):
    selection = Selection(sizes=((16, 32), (32, 16)), chunk_frames=9, min_frames=9)
    clip = next(c for c in read_lists([folder / "list.json"], None, selection)[0] if c.id == "5_0-28")
    checkpoint = Checkpoint.open(model)
    vae = checkpoint.load_vae(jnp.float32)
    mean, logvar = jax.jit(lambda m, x: m.encode(x))(vae, read_clip(clip).astype(np.float32) / 127.5 - 1)
    mean, logvar = np.asarray(normalize(mean, vae.config)), np.asarray(logvar)
    got = next(x for x in records.open_source(whole, "train") if x["id"] == clip.id)["latents"].astype(np.float32)
    noise = (got - mean) / np.exp(logvar / 2)  # tiny.VAE's deviations are 1
    assert abs(noise.mean()) < 0.3
    assert noise.std() == pytest.approx(1, abs=0.2)
    assert run(folder, model, tmp_path / "mean", "--posterior", "mean") == 0
    mean_only = next(x for x in records.open_source(tmp_path / "mean", "train") if x["id"] == clip.id)["latents"]
    np.testing.assert_allclose(mean_only, mean, atol=3e-3)


def test_text_embeddings_equal_the_pipeline(whole, model):
    pipe = tiny.pipeline()
    example = records.open_source(whole, "train")[0]
    texts = np.asarray(pipe.encode_prompt([example["caption"], "", precompute.NEGATIVE_PROMPT]))
    for got, text in zip((example["text"], np.load(whole / EMPTY_TEXT), np.load(whole / NEGATIVE_TEXT)), texts):
        assert got.dtype == np.float16
        np.testing.assert_allclose(got, text, atol=2e-3)


def test_interrupted_command_continues_and_hosts_share_the_work(whole, folder, model, tmp_path, monkeypatch, capsys):
    out, read = tmp_path / "latents", tasks._read

    def interrupted(clip):
        if clip.id == "3_0-10":
            raise KeyboardInterrupt
        return read(clip)

    monkeypatch.setattr(tasks, "_read", interrupted)
    assert run(folder, model, out, "--shard", "0/2") == 130
    assert "goes on" in capsys.readouterr().err
    monkeypatch.setattr(tasks, "_read", read)
    for host in ("1", "0"):  # neither waits for the other
        assert not out.exists()
        monkeypatch.setenv("JAX_PROCESS_ID", host)
        assert run(folder, model, out, "--processes", "2") == 0
        assert not jax.distributed.is_initialized(), "jax takes SIGTERM for itself, and ends no host before the others"
    assert content(out) == content(whole)


def test_finished_dataset_loads_no_weights(whole, folder, model, tmp_path, monkeypatch, capsys):
    for host in ("0/2", "1/2"):
        assert run(folder, model, tmp_path / host[0] / "latents", "--shard", host) == 0
    partial = tmp_path / "0" / "latents.partial"
    for path in (tmp_path / "1" / "latents.partial").rglob("*"):
        if path.is_file():
            (partial / path.relative_to(tmp_path / "1" / "latents.partial")).write_bytes(path.read_bytes())
    monkeypatch.setattr(pretrained, "load_model", None)
    for told in (" records, ", "is complete"):
        assert run(folder, model, tmp_path / "0" / "latents") == 0
        assert told in capsys.readouterr().out
    assert content(tmp_path / "0" / "latents") == content(whole)


def test_text_task_embeds_prompts(model, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a red plus\n\n  a blue bar  \n")
    (tmp_path / "b.csv").write_text('id,prompt,refined_prompt\n1,short,"a long, long text"\n2,other,\n')
    arguments = ["text", "--prompts", f"{tmp_path}/a.txt", f"{tmp_path}/b.csv", "--model", str(model)]
    assert precompute.main([*arguments, "--out", f"{tmp_path}/text", "--shard-size", "3"]) == 0
    assert "4 records" in capsys.readouterr().out
    got = list(records.open_source(tmp_path / "text", "train"))
    assert [x["id"] for x in got] == ["a_00000", "a_00002", "b_00000", "b_00001"]
    assert [x["caption"] for x in got] == ["a red plus", "a blue bar", "a long, long text", "other"]
    texts = np.asarray(tiny.pipeline().encode_prompt([x["caption"] for x in got]))
    np.testing.assert_allclose([x["text"] for x in got], texts, atol=2e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["clips", "--json", "none.json"], "none.json: no such file"),
        (["clips", "--size", "16x24"], "--size 16x24: height and width must be multiples of 16"),
        (["clips", "--size", "16"], "--size is '16': it must read HEIGHTxWIDTH"),
        (["clips", "--chunk-frames", "8"], "a chunk of 8 frames: the VAE takes 1 \\+ 4k"),
        (["clips", "--chunk-frames", "33"], "--min-frames is 9: a chunk has 33"),
        (["clips", "--shard", "2/2"], "--shard is '2/2'"),
        (["clips", "--batch", "0"], "--batch is 0"),
        (["clips", "--readers", "0"], "--readers is 0"),
        (["clips", "--shard-size", "0"], "--shard-size is 0"),
        (["clips", "--min-frames", "121"], "nothing to make, 7 items were refused; the first: 0.mp4: 10 frames"),
        (["clips", "--model", "nowhere"], "no folder nowhere"),
        (["text", "--prompts", "none.txt"], "none.txt: no such file"),
        (["clips", "--seed", "-1"], "--seed must be from 0"),
        (["text", "--max-length", "-1"], "--max-length is -1"),
        (["text", "--max-length", "0"], "--max-length is 0: it must be from 1"),
        (["text", "--max-length", "100000"], "--max-length is 100000: it must be from 1 to"),
        (["text", "--processes", "0"], "--processes is 0: it must be at least 1"),
        (["text", "--processes", "-4"], "--processes is -4"),
        (["text", "--processes", "4"], "--processes is 4: no TPU pod or Slurm says which host this is"),
        (["text", "--max-lenght", "5"], "unrecognized arguments: --max-lenght 5; --help lists all flags"),
        (["text", "--batch", "5"], "unrecognized arguments: --batch 5"),
    ],
)  # fmt: skip
def test_invalid_input_gives_a_one_line_error_before_weights_are_read(
    folder, model, tmp_path, arguments, message, monkeypatch, capsys
):
    monkeypatch.setattr(pretrained, "load_model", None)
    (tmp_path / "a.txt").write_text("a red plus")
    task, *rest = arguments
    base = {"clips": ["--json", f"{folder}/list.json", *OPTIONS], "text": ["--prompts", f"{tmp_path}/a.txt"]}[task]
    assert precompute.main([task, "--model", str(model), "--out", f"{tmp_path}/out", *base, *rest]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(error)


@pytest.mark.parametrize("arguments", [[], ["text"], ["text", "--prompts", "a.txt"], ["--videos", "a", "--outt", "b"]])
def test_an_incomplete_command_is_one_line(arguments, capsys):
    assert precompute.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("precompute: the following arguments are required")


def test_latents_are_not_taken_for_videos(tmp_path, model, monkeypatch, capsys):
    monkeypatch.setattr(pretrained, "load_model", None)
    features = {"latents": records.tensor((1,), np.float16), "caption": records.text(), "id": records.text()}
    example = {"latents": np.zeros(1, np.float16), "caption": "a", "id": "b"}
    records.write(tmp_path / "latents", features, {"train": [example], "test": [example]})
    arguments = ["--videos", f"{tmp_path}/latents", "--model", str(model), "--out", f"{tmp_path}/out"]
    assert precompute.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "latents: its records have no video but caption, id, latents; name a dataset of pixels" in error


def test_too_little_memory_is_one_line(tmp_path, model, monkeypatch, capsys):
    def full(*_, **__):
        raise MemoryError("no room")

    monkeypatch.setattr(precompute.tasks, "encode_prompts", full)
    arguments = ["text", "--prompts", "a.txt", "--model", str(model), "--out", f"{tmp_path}/out"]
    assert precompute.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "out of memory" in error


def test_empty_prompt_files_are_refused(tmp_path, model, capsys):
    for name, text, message in (
        ("a.txt", "\n \n", "holds no prompt"), ("b.csv", "id,text\n1,a\n", "has no column prompt; it has id, text"),
    ):  # fmt: skip
        (tmp_path / name).write_text(text)
        arguments = ["text", "--prompts", f"{tmp_path}/{name}", "--model", str(model), "--out", f"{tmp_path}/out"]
        assert precompute.main(arguments) == 2
        assert message in capsys.readouterr().err
