"""Data, runs, models and videos in a bucket: every command with gs:// paths, and no local folder that is called so."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from flax import nnx
from orbax.checkpoint._src.path import gcs_utils
from PIL import Image

import train
from helios_jax import HeliosPipeline, locations
from helios_jax.data import records
from helios_jax.data.loader import loader
from helios_jax.locations import LocationError, location
from helios_jax.media.mp4 import VideoWriter
from helios_jax.models.transformer import Transformer
from helios_jax.precompute import cli as precompute
from helios_jax.pretrained import CheckpointError, files
from helios_jax.sampling.checkpoint import Checkpoint
from helios_jax.training import start
from helios_jax.training.flow_config import FlowConfig, FlowTrainConfig
from helios_jax.training.stages.flow import FlowStage
from helios_jax.training.trainable import AdapterConfig
from tests import bucket, tiny, tiny_run
from tests.data import test_shards
from tests.training.test_loop import BASE


@pytest.fixture(scope="module", autouse=True)
def server():
    with bucket.serve() as address, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", address)  # read once, when the first array is
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
        # Orbax asks Google's own client whether folders of this bucket are real ones.
        patch.setattr(gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False)
        bucket.register()
        yield address


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
    assert names("bucket") == ["other/a.txt"]
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


def test_compilation_cache_in_an_unknown_place_is_one_line(config, monkeypatch, capfd):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "htp://bucket/cache")
    assert train.main([str(config)]) == 2
    told = capfd.readouterr().err
    assert told.count("\n") == 1
    assert "JAX_COMPILATION_CACHE_DIR: htp://bucket/cache names no place" in told


def test_compiled_programs_are_kept_in_a_bucket(monkeypatch):
    code = "import jax, jax.numpy as jnp\nfrom tests import bucket\nbucket.register()\n"
    code += "from helios_jax.runtime.compilation import enable_cache\nenable_cache()\n"
    code += "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)\n"
    code += (
        "jax.jit(lambda x: jnp.sin(x) + 1)(1.0)\nassert any(name.startswith('bucket/xla/') for name in bucket.OBJECTS)"
    )
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": "gs://bucket/xla", "JAX_PLATFORMS": "cpu"}
    environment.pop("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", None)
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
    assert names("bucket/data") == sorted(test_shards.content(tmp_path / "data"))
    assert whole(out) == whole(tmp_path / "data")
    with pytest.raises(FileExistsError, match="gs://bucket/data already exists"):
        test_shards.begin(out)


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
        assert len(copies) == len([name for name in names("bucket/data") if "array_record" in name])
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


@pytest.fixture(scope="module")
def objects(folder):
    """The tiny pipeline and a LoRA, to be put into the bucket."""
    bucket.OBJECTS.clear()
    locations.copy_tree(folder, location("gs://bucket/model"))
    return dict(bucket.OBJECTS)


@pytest.fixture
def sample_config(tmp_path, folder):
    path = tmp_path / "sample.yaml"
    path.write_text(f"{tiny_run.CONFIG}num_frames: 9\nmodel: {folder}\n")
    return path


@pytest.mark.parametrize("out", ["a.mp4", "a.npz", "a"])
def test_video_of_a_model_in_a_bucket_into_a_bucket(sample_config, objects, tmp_path, out):
    bucket.OBJECTS.update(objects)
    assert tiny_run.run(sample_config, "--out", tmp_path / out) == 0
    remote = ["--model", "gs://bucket/model", "--out", f"gs://bucket/out/{out}", "--state", "gs://bucket/out/state"]
    assert tiny_run.run(sample_config, *remote) == 0
    made = [p for p in [*tmp_path.glob("a*"), *tmp_path.glob("a/*")] if p.is_file()]
    ours = {p.relative_to(tmp_path).as_posix(): p.read_bytes() for p in made}
    theirs = {name: bucket.OBJECTS[f"bucket/out/{name}"][1] for name in names("bucket/out") if name != "state"}
    assert set(ours) == set(theirs)
    compared = [name for name in ours if not name.endswith((".json", ".npz"))]
    assert {name: ours[name] for name in compared} == {name: theirs[name] for name in compared}
    assert tiny_run.run(sample_config, *remote) == 2  # it is there already
    assert tiny_run.run(sample_config, "--resume", "gs://bucket/out/state", *remote[2:4], "--num-frames", "18") == 0


def test_input_image_in_a_bucket(sample_config, tmp_path):
    Image.fromarray(np.zeros((32, 48, 3), np.uint8)).save(tmp_path / "i.png")
    locations.upload(tmp_path / "i.png", location("gs://bucket/i.png"))
    assert tiny_run.run(sample_config, "--image", "gs://bucket/i.png", "--out", tmp_path / "i.mp4") == 0


@pytest.mark.parametrize(
    ("flag", "text", "told"),
    [
        ("--out", "htp://b/x.mp4", "names no place"),
        ("--model", "gs://bucket/absent", "no folder gs://bucket/absent"),
        ("--image", "gs://bucket/absent.png", "gs://bucket/absent.png: no such file"),
        ("--image", "gs:/x.png", "gs:/x.png"),
        ("--lora", "gs://bucket/absent", "no file gs://bucket/absent"),
        ("--profile", "gs://bucket/profile", "must be local"),
    ],
)
def test_bad_location_of_a_video_is_one_line(sample_config, tmp_path, capsys, flag, text, told):
    assert tiny_run.run(sample_config, "--out", tmp_path / "x.mp4", flag, text) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert told in line


def test_weights_in_a_bucket_are_read_by_ranges(objects):
    bucket.OBJECTS.update(objects)
    path = location("gs://bucket/model/vae/diffusion_pytorch_model.safetensors")
    tensors, _ = files.read_header(path)
    assert all(np.isfinite(tensor.read().astype(np.float32)).all() for tensor in tensors.values())
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
        files.read_header(path)


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
        locations.upload(tmp_path / name.partition("/")[2], location(f"gs://{name}"))
    command = ["clips", "--json", "gs://bucket/clips.json", "--model", str(folder), "--size", "32x48"]
    command += ["--chunk-frames", "9", "--min-frames", "9", "--out", "gs://bucket/latents"]
    assert precompute.main(command) == 0, capsys.readouterr().err
    source = records.open_source("gs://bucket/latents", "train")
    assert [example["id"] for example in source] == ["v_0-9", "gs:/other/v_0-9"]
    assert "gs://bucket/absent.mp4: no such file" in location("gs://bucket/latents/rejected.jsonl").read_text()
    assert precompute.main(command) == 2
    assert "gs://bucket/latents already exists" in capsys.readouterr().err


@pytest.mark.parametrize("argument", ["--out", "--json"])
def test_bad_location_of_precompute_is_told(argument, capsys):
    given = {"--out": "x", "--json": "y", argument: "htp://b/x"}
    with pytest.raises(SystemExit) as ended:
        precompute.main(["clips", *[part for pair in given.items() for part in pair]])
    assert ended.value.code == 2
    assert "htp://b/x names no place" in capsys.readouterr().err


def test_export_of_adapters_and_components_into_a_bucket(folder, objects, tmp_path, capsys):
    """Byte for byte that into a local folder, of components that are local or in a bucket themselves."""
    bucket.OBJECTS.update(objects)
    adapters = AdapterConfig(rank=2, target_modules=("to_q", "patch_embedding"))
    model = tiny.draw(Transformer.abstract(tiny.TRANSFORMER, stacked=True), np.random.default_rng(0))
    model = start._add_adapters(model, adapters, 0)
    for components, out in ((folder, tmp_path / "run"), ("gs://bucket/model", location("gs://bucket/run"))):
        config = FlowTrainConfig(lora=adapters, trainable=("adapters",), flow=FlowConfig(components=str(components)))
        config.model.transformer = tiny.TRANSFORMER
        FlowStage(config).export(model, out)
        assert f"exported {out}/pipeline" in capsys.readouterr().out
    local = {p.relative_to(tmp_path / "run").as_posix(): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert {name: bucket.OBJECTS[f"bucket/run/{name}"][1] for name in names("bucket/run")} == local
    assert {name.partition("/")[0] for name in local} == {"lora", "pipeline"}
    assert Checkpoint.open("gs://bucket/run/pipeline").variant == Checkpoint.open(tmp_path / "run/pipeline").variant


def test_pipeline_saved_in_a_bucket_is_the_one_that_was_loaded(objects):
    bucket.OBJECTS.update(objects)
    HeliosPipeline.from_pretrained("gs://bucket/model").save_pretrained("gs://bucket/saved")
    again = HeliosPipeline.from_pretrained("gs://bucket/saved")
    first = HeliosPipeline.from_pretrained("gs://bucket/model")
    for name in ("transformer", "vae", "text_encoder"):
        ours, theirs = (jax.tree.leaves(nnx.state(getattr(pipe, name))) for pipe in (again, first))
        assert all(np.array_equal(one, other) for one, other in zip(ours, theirs, strict=True))
