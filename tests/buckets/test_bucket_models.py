"""Models, LoRA files, inputs and videos in a bucket."""

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from helios_jax import HeliosPipeline, locations
from helios_jax.locations import location
from helios_jax.models.transformer import Transformer
from helios_jax.pretrained import CheckpointError, files
from helios_jax.sampling.checkpoint import Checkpoint
from helios_jax.training import start
from helios_jax.training.flow_config import FlowConfig, FlowTrainConfig
from helios_jax.training.stages.flow import FlowStage
from helios_jax.training.trainable import AdapterConfig
from tests import tiny, tiny_run
from tests.buckets import bucket


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
    theirs = {name: bucket.OBJECTS[f"bucket/out/{name}"][1] for name in bucket.names("bucket/out") if name != "state"}
    assert set(ours) == set(theirs)
    compared = [name for name in ours if not name.endswith((".json", ".npz"))]
    assert {name: ours[name] for name in compared} == {name: theirs[name] for name in compared}
    assert tiny_run.run(sample_config, *remote) == 2  # it is there already
    assert tiny_run.run(sample_config, "--resume", "gs://bucket/out/state", *remote[2:4], "--num-frames", "18") == 0


def test_profile_of_a_chunk_into_a_bucket(sample_config, tmp_path):
    remote = ["--profile", "gs://bucket/profile", "--num-frames", "18"]
    assert tiny_run.run(sample_config, "--out", tmp_path / "x.mp4", *remote) == 0
    (name,) = (name for name in bucket.names("bucket/profile") if name.endswith(".xplane.pb"))
    assert b"PjitFunction(denoise_step)" in bucket.OBJECTS[f"bucket/profile/{name}"][1]


def test_input_image_in_a_bucket(sample_config, tmp_path):
    Image.fromarray(np.zeros((32, 48, 3), np.uint8)).save(tmp_path / "i.png")
    locations.copy_file(tmp_path / "i.png", location("gs://bucket/i.png"))
    assert tiny_run.run(sample_config, "--image", "gs://bucket/i.png", "--out", tmp_path / "i.mp4") == 0


@pytest.mark.parametrize(
    ("flag", "text", "told"),
    [
        ("--out", "htp://b/x.mp4", "names no place"),
        ("--model", "gs://bucket/absent", "no folder gs://bucket/absent"),
        ("--image", "gs://bucket/absent.png", "gs://bucket/absent.png: no such file"),
        ("--image", "gs:/x.png", "gs:/x.png"),
        ("--lora", "gs://bucket/absent", "no file gs://bucket/absent"),
        ("--profile", "htp://b/x", "names no place"),
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
    assert {name: bucket.OBJECTS[f"bucket/run/{name}"][1] for name in bucket.names("bucket/run")} == local
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
