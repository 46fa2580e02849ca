"""Folders that cannot be used: one line that names the file and the rule, before weights are read."""

import json
import shutil
import subprocess
import sys
from functools import partial

import huggingface_hub
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from helios_jax import HeliosPipeline
from helios_jax.pretrained import CheckpointError
from helios_jax.sampling.checkpoint import Checkpoint
from tests import fake_hub


@pytest.fixture
def folder(changeable):
    return changeable


def edit(path, **changes):
    values = json.loads(path.read_text())
    values.update(changes)
    path.write_text(json.dumps(values))


def rewrite(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def missing_part(folder):
    shutil.rmtree(folder / "vae")
    return ["vae", "missing"]


def missing_weights(folder):
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    return ["transformer", "no weights"]


def truncated(folder):
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return ["transformer", "download"]


def lacking_key(folder):
    rewrite(folder / "vae" / "diffusion_pytorch_model.safetensors", lambda t: t.pop("quant_conv.bias"))
    return ["vae", "lacks quant_conv.bias"]


def unknown_key(folder):
    path = folder / "text_encoder" / "model.safetensors"
    rewrite(path, lambda t: t.update(extra=np.zeros(2, np.float32)))
    return ["text_encoder", "extra"]


def wrong_shape(folder):
    def change(tensors):
        tensors["proj_out.bias"] = np.zeros(3, np.float32)

    rewrite(folder / "transformer" / "diffusion_pytorch_model.safetensors", change)
    return ["proj_out.bias", "[3]", "[16]"]


def pyramid(folder):
    edit(folder / "scheduler" / "scheduler_config.json", stages=3)
    return ["stages", "3"]


def other_class(folder):
    edit(folder / "model_index.json", _class_name="WanPipeline")
    return ["WanPipeline"]


def bad_size(folder):
    edit(folder / "model_index.json", _trained_size=32)
    return ["model_index.json", "_trained_size is 32", "[height, width]"]


def bad_sizes(folder):
    edit(folder / "model_index.json", _trained_size=[32, "48"])
    return ["_trained_size is [32, '48']"]


def broken_json(folder):
    (folder / "transformer" / "config.json").write_text("{")
    return ["config.json", "not JSON"]


def bad_value(folder):
    edit(folder / "transformer" / "config.json", rope_dim=[4, 4, 4])
    return ["rope_dim", "attention_head_dim"]


def no_tokenizer(folder):
    (folder / "tokenizer" / "tokenizer.json").unlink()
    return ["tokenizer.json", "missing"]


def lost_shard(folder):
    part = folder / "transformer"
    (part / "diffusion_pytorch_model.safetensors").rename(part / "a.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (part / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return ["b.safetensors", "missing"]


BREAKS = [
    missing_part,
    missing_weights,
    truncated,
    lacking_key,
    unknown_key,
    wrong_shape,
    pyramid,
    other_class,
    bad_size,
    bad_sizes,
    broken_json,
    bad_value,
    no_tokenizer,
    lost_shard,
]


@pytest.mark.parametrize("spoil", BREAKS, ids=lambda f: f.__name__)
def test_one_line_names_the_fault(spoil, folder):
    words = spoil(folder)
    with pytest.raises((CheckpointError, ValueError)) as error:
        Checkpoint.open(folder)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_no_such_folder():
    with pytest.raises(CheckpointError, match="no folder nowhere"):
        Checkpoint.open("nowhere")


def test_an_unknown_config_key_is_ignored_with_a_warning(folder):
    edit(folder / "transformer" / "config.json", is_train_restrict_lora=False)
    with pytest.warns(UserWarning, match="is_train_restrict_lora"):
        Checkpoint.open(folder)


def test_saving_and_loading_keeps_every_value(folder, tmp_path):
    pipe = HeliosPipeline.from_pretrained(folder)
    stacked = HeliosPipeline.from_pretrained(folder, stacked=True)
    pipe.save_pretrained(tmp_path / "a")
    stacked.save_pretrained(tmp_path / "b")
    for part in ("transformer", "vae", "text_encoder"):
        file = next((folder / part).glob("*.safetensors")).name
        expected = load_file(folder / part / file)
        for copy in ("a", "b"):
            values = load_file(tmp_path / copy / part / file)
            assert values.keys() == expected.keys()
            for key, value in values.items():
                np.testing.assert_array_equal(value, expected[key])


def test_neither_torch_nor_transformers_is_imported(folder):
    code = f"""
import sys
from functools import partial
from helios_jax import HeliosPipeline
HeliosPipeline.from_pretrained({str(folder)!r})
assert not {{"torch", "transformers", "diffusers", "tensorflow"}} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_transformer_of_another_stage_is_chosen_by_its_subfolder(folder):
    ode = folder / "transformer_ode"
    shutil.copytree(folder / "transformer", ode)
    rewrite(ode / "diffusion_pytorch_model.safetensors", lambda t: t.update({"proj_out.bias": np.full(16, 3, "f4")}))
    for name, expected in (("transformer", False), ("transformer_ode", True)):
        checkpoint = Checkpoint.open(folder, transformer=name)
        model = checkpoint.load_transformer(jnp.float32, stacked=False)
        assert bool((model.proj_out.bias[...] == 3).all()) is expected
    with pytest.raises(CheckpointError, match=r"no transformer_mid/config.json; it has transformer, transformer_ode$"):
        Checkpoint.open(folder, transformer="transformer_mid")


def test_a_transformer_of_another_folder_is_chosen_by_its_path(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ode = shutil.copytree(folder / "transformer", tmp_path / "merged" / "transformer")
    rewrite(ode / "diffusion_pytorch_model.safetensors", lambda t: t.update({"proj_out.bias": np.full(16, 3, "f4")}))
    hashes = set()
    for name in ("merged/transformer", str(ode)):
        checkpoint = Checkpoint.open(folder, transformer=name)
        assert bool((checkpoint.load_transformer(jnp.float32, stacked=False).proj_out.bias[...] == 3).all())
        hashes.add(checkpoint.hash())
    assert len(hashes) == 1


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """A repository of the released layout behind huggingface_hub, and the set of files that were downloaded."""
    repository = shutil.copytree(folder, tmp_path / "repository")
    for stage in ("transformer_init", "transformer_ode"):
        shutil.copytree(folder / "transformer", repository / stage)
    for other in ("transformer/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.bin", "a.mp4"):
        (repository / other).write_bytes(b"")
    files = sorted(str(path.relative_to(repository)) for path in repository.rglob("*") if path.is_file())
    got: set[str] = set()

    def snapshot_download(name, *, allow_patterns, revision):
        assert (name, revision) == ("someone/helios", "v1")
        snapshot = tmp_path / "snapshot"
        for file in huggingface_hub.utils.filter_repo_objects(files, allow_patterns=allow_patterns):
            got.add(file)
            (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repository / file, snapshot / file)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "model_info", partial(fake_hub.info, files=files))
    return got


def test_only_what_is_needed_is_downloaded(hub):
    Checkpoint.open("someone/helios", transformer="transformer_ode", revision="v1")
    assert {file.split("/")[0] for file in hub} == {
        "model_index.json", "scheduler", "text_encoder", "tokenizer", "transformer_ode", "vae"
    }  # fmt: skip
    assert not any(file.endswith((".bin", ".mp4")) for file in hub)
    hub.clear()
    Checkpoint.open("someone/helios", revision="v1")
    assert {file for file in hub if file.startswith("transformer")} == {
        "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"
    }  # fmt: skip


def test_the_hub_s_subfolders_are_named(hub):
    with pytest.raises(CheckpointError, match=r"it has transformer, transformer_init, transformer_ode$"):
        Checkpoint.open("someone/helios", transformer="transformer_odd", revision="v1")


def test_a_name_that_is_no_folder_and_no_repository():
    with pytest.raises(CheckpointError, match=r"no folder \./nowhere: give"):
        Checkpoint.open("./nowhere")


def test_half_precision_keeps_float32_islands(folder):
    pipe = HeliosPipeline.from_pretrained(folder, dtype=jnp.bfloat16)
    block = pipe.transformer.blocks[0]
    assert block.ffn.up.weight.dtype == jnp.bfloat16
    assert block.scale_shift_table.dtype == jnp.float32
    assert pipe.vae.decoder.conv_in.weight.dtype == jnp.float32
