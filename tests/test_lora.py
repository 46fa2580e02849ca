"""Adapters on a model: attaching, scales, merging and taking off, new ones, several devices."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from helios_jax import lora
from helios_jax.diffusion.memory import MemoryConfig
from helios_jax.lora import LoRAConfig, LoRAWeight
from helios_jax.lora.__main__ import main
from helios_jax.models.layers import Linear
from helios_jax.models.transformer import Transformer
from helios_jax.pretrained import (
    CheckpointError,
    count,
    file_entries,
    load_model,
    save_model,
    to_arrays,
)
from helios_jax.sharding import MeshConfig, make_mesh, shardings
from helios_jax.trained import Levels, Trained, read_trained
from tests import tiny
from tests.closeness import assert_close, error
from tests.processes import environment
from tests.tiny_lora import ARRAYS, FFN, PATCH, A, B, Q, model, pair


def weight_of(module):
    return np.asarray(module.weight[...], np.float32)


def test_adapters_are_separate_from_base_parameters(tmp_path):
    base = model()
    adapted = lora.attach(base, {"a": lora.from_arrays(ARRAYS)})
    assert lora.names(adapted) == ["a"]
    assert lora.names(base) == []
    assert count(adapted) == count(base)
    assert file_entries(adapted) == file_entries(base)
    save_model(adapted, tiny.TRANSFORMER, tmp_path)
    assert lora.names(load_model(Transformer.abstract(tiny.TRANSFORMER), tmp_path)) == []
    weights = jax.tree.leaves(nnx.state(adapted, LoRAWeight))
    assert sum(x.size for x in weights) == sum(x.size for x in ARRAYS.values())
    assert lora.names(lora.remove(adapted)) == []
    assert jax.tree.structure(lora.remove(adapted)) == jax.tree.structure(base)


def test_scales_change_without_recompilation_and_add_up():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 32)), jnp.float32)
    compiled = []

    @jax.jit
    def run(model):
        compiled.append(1)
        return model.blocks[0].attn1.to_q(x)

    base = model()
    files = {"a": lora.from_arrays(pair(Q)), "b": lora.from_arrays(pair(Q, rank=2, seed=2))}
    both = lora.attach(base, files)
    a, b = (np.asarray(run(lora.remove(both, other)) - run(base)) for other in ("b", "a"))
    start = len(compiled)
    for scales in ((1, 1), (0.5, -2), (0, 0)):
        scaled = lora.set_scale(lora.set_scale(both, "a", scales[0]), "b", scales[1])
        expected = np.asarray(run(base)) + scales[0] * a + scales[1] * b
        assert_close(run(scaled), expected)
    assert len(compiled) == start + 1
    assert_close(run(both), np.asarray(run(base)) + a + b)  # its own scales stayed


def test_unknown_and_taken_names_are_errors():
    adapted = lora.attach(model(), {"a": lora.from_arrays(ARRAYS)})
    for call in (
        lambda: lora.set_scale(adapted, "b", 1.0),
        lambda: lora.remove(adapted, "b"),
        lambda: lora.merge(adapted, "b"),
    ):
        with pytest.raises(ValueError, match="no adapter b; there is a"):
            call()
    with pytest.raises(ValueError, match="no adapter c; there is b"):
        lora.attach(adapted, {"b": lora.from_arrays(ARRAYS)}, {"c": 1.0})
    with pytest.raises(ValueError, match="a is attached already"):
        lora.attach(adapted, {"a": lora.from_arrays(ARRAYS)})
    with pytest.raises(ValueError, match="a is attached: merge it"):
        lora.unmerge(adapted, {"b": lora.from_arrays(ARRAYS)})


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("stacked", [False, True])
def test_unmerging_restores_weights_up_to_rounding(stacked, dtype):
    files = {"a": lora.from_arrays(ARRAYS), "b": lora.from_arrays(pair(Q, rank=2, seed=2))}
    base = model(stacked, dtype)
    merged = lora.merge(lora.attach(base, files, {"a": 0.3}))
    again = lora.unmerge(merged, files, {"a": 0.3})
    assert lora.names(merged) == lora.names(again) == []
    before, during, after = to_arrays(base), to_arrays(merged), to_arrays(again)
    unit = float(jnp.finfo(dtype).eps)  # half of it each for what is merged and for what is left
    for key, value in before.items():
        assert after[key].dtype == value.dtype
        old, middle, new = (np.asarray(x[key], np.float64) for x in (before, during, after))
        assert (np.abs(new - old) <= unit * np.maximum(np.abs(old), np.abs(middle))).all(), key
    touched = {key for key in before if (during[key] != before[key]).any()}
    assert touched == {f"{name}.weight" for name in (Q, FFN, PATCH)}


def test_one_adapter_is_merged_and_the_others_stay():
    files = {"a": lora.from_arrays(pair(Q)), "b": lora.from_arrays(pair(Q, seed=2))}
    both = lora.attach(model(), files)
    merged = lora.merge(both, "a")
    assert lora.names(merged) == ["b"]
    expected = weight_of(both.blocks[0].attn1.to_q) + (ARRAYS[B] @ ARRAYS[A]).T
    assert_close(weight_of(merged.blocks[0].attn1.to_q), expected)
    donated = lora.merge(both, donate=True)
    with pytest.raises(RuntimeError, match="deleted"):
        np.asarray(both.blocks[0].attn1.to_q.weight[...])
    assert np.isfinite(weight_of(donated.blocks[0].attn1.to_q)).all()


def test_a_bias_needs_a_layer_that_has_one():
    class Net(nnx.Module):
        def __init__(self):
            self.up = Linear(4, 4, bias=False, rngs=nnx.Rngs(0))

    file = lora.from_arrays({"up.diff_b": np.ones(4, np.float32)})
    with pytest.raises(CheckpointError, match="up has a bias, the layer has none"):
        lora.merge(lora.attach(Net(), {"a": file}))


# --- to be trained ---------------------------------------------------------------------------------------------------

CONFIG = LoRAConfig(
    3, alpha=6, target_modules=["to_q", "ffn.net.2", "patch_mid"], exclude_modules=r"blocks\.1\.attn2\..*"
)


def test_new_adapters_are_the_same_for_stacked_and_listed_blocks_and_are_saved(tmp_path):
    files = []
    for stacked in (False, True):
        base = model(stacked)
        new = lora.add(base, CONFIG, jax.random.key(0))
        b = (
            np.zeros(new.blocks.attn1.to_q.adapters[0].b.shape)
            if stacked
            else new.blocks[0].attn1.to_q.adapters[0].b[...]
        )
        assert not b.any()
        files.append(lora.save(new, tmp_path / str(stacked)))
        # Nothing has changed yet, also where it is read back.
        assert all((a == b).all() for a, b in zip(*(to_arrays(lora.merge(m)).values() for m in (new, base))))
        again = lora.attach(base, {"default": files[-1]}, dtype=jnp.float32)
        for x, y in zip(*(jax.tree.leaves(nnx.state(m, (LoRAWeight, lora.LoRAScale))) for m in (new, again))):
            np.testing.assert_array_equal(x, y)
    listed, stacked = (load_file(file) for file in files)
    names = {key.removeprefix("transformer.").rpartition(".lora_")[0] for key in listed}
    assert names == {
        PATCH, *(f"blocks.{i}.{n}" for i in (0, 1) for n in ("attn1.to_q", "ffn.net.2")), "blocks.0.attn2.to_q"
    }  # fmt: skip
    assert listed.keys() == stacked.keys()
    for key, value in listed.items():
        np.testing.assert_array_equal(value, stacked[key])
    assert lora.save(new, tmp_path / "x.safetensors", dtype=jnp.bfloat16) == tmp_path / "x.safetensors"
    assert {str(v.dtype) for v in load_file(tmp_path / "x.safetensors").values()} == {"bfloat16"}


def test_every_linear_layer_by_default():
    abstract = jax.eval_shape(lambda m: lora.add(m, LoRAConfig(2), jax.random.key(0)), model())
    targets = lora.adapters.targets(abstract)
    chosen = {name for name, t in targets.items() if lora.adapters.module_at(abstract, t.path).adapters is not None}
    assert chosen == {name for name, target in targets.items() if not name.startswith("patch")}
    assert len(chosen) == 2 * 10 + 6
    with pytest.raises(ValueError, match=r"target_modules \['to_x'\] fit no layer"):
        lora.add(model(), LoRAConfig(target_modules=["to_x"]), jax.random.key(0))
    with pytest.raises(ValueError, match="rank is 0"):
        LoRAConfig(0)


def test_gradients_reach_adapters_and_nothing_else():
    new = lora.add(model(), CONFIG, jax.random.key(0))
    graph, weights, rest = nnx.split(new, LoRAWeight, ...)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 3, 32)), jnp.float32)

    def loss(weights):
        model = nnx.merge(graph, weights, rest)
        return jnp.square(model.blocks[1].ffn(x)).sum()

    for path, grad in nnx.to_flat_state(jax.grad(loss)(weights)):
        assert bool(jnp.any(grad[...] != 0)) == (path[:3] == ("blocks", 1, "ffn") and path[-1] == "b"), path


# --- several devices -------------------------------------------------------------------------------------------------


def test_adapters_are_sharded_like_weights(tmp_path):
    subprocess.run([sys.executable, __file__, str(tmp_path / "out.json")], env=environment(devices=8), check=True)
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["a"] == [None, "fsdp", None]
    assert result["b"] == [None, None, "tensor"]
    assert result["new a"] == result["a"]
    assert result["in training"] == {"a": [None, "fsdp", None], "b": [None, "fsdp", "tensor"]}
    assert result["weight"] == result["merged"] == [None, "fsdp", "tensor"]
    assert result["error"] < 5e-6


def on_eight() -> dict:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    base, files = model(stacked=True), {"a": lora.from_arrays({**pair(Q), **pair(PATCH)})}
    split = jax.device_put(base, shardings(base, mesh))
    expected = to_arrays(lora.merge(lora.attach(base, files)))
    adapted = lora.attach(split, files)
    new = lora.add(split, dataclasses.replace(CONFIG, rank=4), jax.random.key(0))
    merged = lora.merge(adapted)
    weights = to_arrays(merged)

    def spec(module, name):
        return list(getattr(module, name)[...].sharding.spec)

    return {
        "a": spec(adapted.blocks.attn1.to_q.adapters[0], "a"),
        "b": spec(adapted.blocks.attn1.to_q.adapters[0], "b"),
        "new a": spec(new.blocks.attn1.to_q.adapters[0], "a"),
        "in training": {
            part: list(getattr(shardings(new, mesh).blocks.attn1.to_q.adapters[0], part).get_value().spec)
            for part in "ab"
        },
        "weight": spec(split.blocks.attn1.to_q, "weight"),
        "merged": spec(merged.blocks.attn1.to_q, "weight"),
        "error": max(error(weights[k], expected[k]) for k in expected),
    }


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_merges_files_into_a_transformer(tmp_path, capsys):
    save_model(model(), tiny.TRANSFORMER, tmp_path / "pipeline" / "transformer_mid")
    save_file(ARRAYS, tmp_path / "a.safetensors")
    save_file(pair(Q, seed=2), tmp_path / "b.safetensors")
    arguments = [str(tmp_path / "pipeline"), str(tmp_path / "out"), "--transformer", "transformer_mid"]
    command = [*arguments, "--dtype", "float32", "--lora", f"{tmp_path}/a.safetensors"]
    assert main([*command, "--lora", f"{tmp_path}/b.safetensors=0.5"]) == 0
    files = {"a": tmp_path / "a.safetensors", "b": tmp_path / "b.safetensors"}
    expected = to_arrays(lora.merge(lora.attach(model(), files, {"b": 0.5})))
    written = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    assert_close({key: written[key] for key in expected}, expected)


@pytest.mark.parametrize(
    ("out", "name", "told"),
    [
        ("new", "a.safetensors=much", "much"),
        ("new", "c.safetensors", "no file"),
        ("transformer", "a.safetensors", "is there already"),  # the model's own folder
        ("a.safetensors", "a.safetensors", "is there already"),
        ("a.safetensors/new", "a.safetensors", "cannot be made"),
    ],
)
def test_the_command_refuses_in_one_line(tmp_path, capsys, out, name, told):
    save_model(model(), tiny.TRANSFORMER, tmp_path / "transformer")
    save_file(ARRAYS, tmp_path / "a.safetensors")
    before = (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert main([str(tmp_path), str(tmp_path / out), "--lora", f"{tmp_path}/{name}"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert told in line
    assert (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes() == before


def test_the_command_keeps_what_the_model_was_trained_with(tmp_path):
    student = Trained(MemoryConfig(positions="absolute"), (1, 1, 1), True)
    save_model(model(), tiny.TRANSFORMER, tmp_path / "model", more=student.entries())
    save_file(ARRAYS, tmp_path / "a.safetensors")
    assert main([str(tmp_path / "model"), str(tmp_path / "out"), "--lora", f"{tmp_path}/a.safetensors"]) == 0
    assert read_trained(tmp_path / "out") == student


def test_the_command_records_the_kind_that_a_lora_makes(tmp_path):
    mid = Trained(kind="mid", levels=Levels((0, 0.5, 1), 1 / 3))
    save_model(model(), tiny.TRANSFORMER, tmp_path / "model", more=Trained(kind="base").entries())
    save_file(ARRAYS, tmp_path / "a.safetensors", metadata=mid.metadata())
    assert main([str(tmp_path / "model"), str(tmp_path / "out"), "--lora", f"{tmp_path}/a.safetensors"]) == 0
    assert read_trained(tmp_path / "out") == mid


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(on_eight()))


@pytest.mark.parametrize("arguments", [[], ["model"], ["model", "out"], ["model", "out", "--lora", "a", "--dtyp", "x"]])
def test_an_unusable_command_is_one_line(arguments, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("helios_jax.lora: ")
