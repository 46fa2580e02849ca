"""Adapters: what files may hold, attaching, scales, merging and taking off, new ones, several devices."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from helios_jax import lora
from helios_jax.lora import LoRAConfig, LoRAWeight
from helios_jax.lora.__main__ import main
from helios_jax.models.layers import Linear
from helios_jax.models.transformer import Transformer
from helios_jax.pretrained import (
    CheckpointError,
    count,
    file_entries,
    from_arrays,
    load_model,
    save_model,
    to_arrays,
)
from helios_jax.sharding import MeshConfig, make_mesh, shardings
from tests import tiny
from tests.closeness import assert_close, error

Q, FFN, PATCH = "blocks.0.attn1.to_q", "blocks.1.ffn.net.2", "patch_mid"


def model(stacked=False, dtype=None, seed=0):
    arrays = to_arrays(tiny.draw(Transformer.abstract(tiny.TRANSFORMER), np.random.default_rng(seed)))
    return from_arrays(Transformer.abstract(tiny.TRANSFORMER, stacked=stacked), arrays, dtype=dtype)


def pair(name, rank=4, seed=1, out=None):
    """A file's keys for one module of the tiny model."""
    out, *inner = lora.adapters.targets(Transformer.abstract(tiny.TRANSFORMER))[name].shape
    rng = np.random.default_rng(seed)
    ones = [1] * (len(inner) - 1)
    return {
        f"transformer.{name}.lora_A.weight": rng.standard_normal((rank, *inner)).astype(np.float32),
        f"transformer.{name}.lora_B.weight": rng.standard_normal((out, rank, *ones)).astype(np.float32),
    }


ARRAYS = {**pair(Q), **pair(FFN, rank=2), **pair(PATCH, rank=3)}


def weight_of(module):
    return np.asarray(module.weight[...], np.float32)


# --- files -----------------------------------------------------------------------------------------------------------


def broken(change):
    arrays = dict(ARRAYS)
    change(arrays)
    return arrays


A, B = f"transformer.{Q}.lora_A.weight", f"transformer.{Q}.lora_B.weight"
FAULTS = {
    "half a pair": (lambda a: a.pop(B), ["one half only", Q]),
    "ranks": (lambda a: a.update({B: a[B][:, :3]}), ["ranks", Q, "[32, 3]"]),
    "shape": (lambda a: a.update({A: a[A][:, :30]}), ["does not fit", Q, "[4, 30]", "[4, 32]"]),
    "unknown module": (
        lambda a: a.update({k.replace("to_q", "to_x"): v for k, v in pair(Q).items()}),
        ["blocks.0.attn1.to_x", "no layers of this model"],
    ),
    "full weights": (lambda a: a.update({"patch_short.weight": np.zeros(2)}), ["patch_short.weight", "not a LoRA"]),
    "DoRA": (lambda a: a.update({f"{Q}.dora_scale": np.zeros((32, 1))}), ["dora_scale", "not a LoRA"]),
    "alpha alone": (lambda a: a.update({"blocks.0.attn1.to_v.alpha": np.ones(())}), ["alpha", "to_v"]),
    "twice": (lambda a: a.update({A.replace("lora_A", "lora_down"): a[A]}), ["twice", Q]),
    "bias": (lambda a: a.update({B.replace("weight", "bias"): np.zeros(3)}), ["bias is [3], not [32]"]),
    "nothing": (lambda a: a.clear(), ["no LoRA"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_error_names_the_fault_in_one_line(fault):
    change, words = FAULTS[fault]
    with pytest.raises(CheckpointError) as error:
        lora.attach(Transformer.abstract(tiny.TRANSFORMER), {"a": lora.from_arrays(broken(change))})
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_many_unmatched_keys_are_counted():
    arrays = {f"blocks.{i}.attn1.to_x.lora_{x}.weight": np.zeros((4, 4), np.float32) for i in range(9) for x in "AB"}
    with pytest.raises(CheckpointError, match=r"blocks\.0\.attn1\.to_x.* and 5 more"):
        lora.attach(Transformer.abstract(tiny.TRANSFORMER), {"a": lora.from_arrays(arrays)})


def test_peft_s_config_scales():
    config = {"r": 4, "lora_alpha": 8, "rank_pattern": {"net.2": 2, "patch_mid": 3}, "alpha_pattern": {"^patch.*": 1.5}}
    changes = lora.from_arrays(ARRAYS, config).changes
    assert [changes[n].scaling for n in (Q, FFN, PATCH)] == [2, 4, 0.5]
    assert lora.from_arrays(ARRAYS, {**config, "use_rslora": True}).changes[Q].scaling == 4
    with pytest.raises(CheckpointError, match=r"to_q has rank 4, but the file's own config says 16"):
        lora.from_arrays(ARRAYS, {**config, "r": 16})
    with pytest.raises(CheckpointError, match="both"):
        lora.from_arrays({**ARRAYS, f"{Q}.alpha": np.ones(())}, config)
    with pytest.raises(CheckpointError, match="DoRA"):
        lora.from_arrays(ARRAYS, {**config, "use_dora": True})


def test_changes_of_norms_are_ignored_with_a_warning():
    arrays = {**ARRAYS, "diffusion_model.blocks.0.norm3.diff": np.zeros(32, np.float32)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora.attach(model(), {"a": lora.from_arrays(arrays)})
    arrays["diffusion_model.blocks.1.norm3.diff_b"] = np.ones(32, np.float32)
    with pytest.warns(UserWarning, match=r"ignored what it changes in blocks\.1\.norm3"):
        lora.attach(model(), {"a": lora.from_arrays(arrays)})


@pytest.mark.parametrize("stacked", [False, True])
def test_a_bias_alone_is_added(stacked):
    bias = np.arange(32, dtype=np.float32)
    base = model(stacked)
    merged = lora.merge(lora.attach(base, {"a": lora.from_arrays({f"diffusion_model.{Q}.diff_b": bias})}, {"a": 2}))
    before, after = to_arrays(base), to_arrays(merged)
    assert_close(after[f"{Q}.bias"], before[f"{Q}.bias"] + 2 * bias)
    assert all((after[key] == value).all() for key, value in before.items() if key != f"{Q}.bias")


def test_a_file_is_found_in_folders_and_repositories(tmp_path, monkeypatch):
    save_file(ARRAYS, tmp_path / "one.safetensors")
    expected = lora.read(tmp_path / "one.safetensors").changes.keys()
    assert lora.read(tmp_path).changes.keys() == expected == {Q, FFN, PATCH}
    save_file(pair(Q), tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"several.*one.safetensors, two.safetensors"):
        lora.read(tmp_path)
    assert lora.read(tmp_path, weight_name="two.safetensors").changes.keys() == {Q}
    save_file(pair(FFN), tmp_path / "pytorch_lora_weights.safetensors")
    assert lora.read(tmp_path).changes.keys() == {FFN}

    monkeypatch.setattr(
        huggingface_hub, "list_repo_files", lambda name, revision: ["a/b.safetensors", "two.safetensors"]
    )
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file, revision: tmp_path / file)
    assert lora.read("someone/style").changes.keys() == {Q}
    for name, message in (("nowhere.safetensors", "no file"), ("nowhere", "no folder"), (tmp_path / "x", "no folder")):
        with pytest.raises(CheckpointError, match=message):
            lora.read(name)


@pytest.mark.parametrize(
    "prefix", ["model.diffusion_model.", "_orig_mod.", "lora_unet__", "base_model.model._orig_mod."]
)
def test_prefixes_and_other_parts_of_files_in_circulation(prefix):
    arrays = {key.replace("transformer.", prefix): value for key, value in ARRAYS.items()}
    for i in (0, 1):
        arrays[f"diffusion_model.blocks.{i}.cross_attn.k_img.lora_down.weight"] = np.zeros((2, 3), np.float32)
    with pytest.warns(UserWarning, match="ignored 2 modules for image inputs") as seen:
        assert lora.from_arrays(arrays).changes.keys() == {Q, FFN, PATCH}
    assert len(seen) == 1


def test_the_last_equals_sign_before_a_number_is_the_scale():
    assert lora.file_and_scale("runs/rank=32/x.safetensors=0.8") == ("runs/rank=32/x.safetensors", 0.8)
    assert lora.file_and_scale("runs/rank=32/x.safetensors") == ("runs/rank=32/x.safetensors", 1.0)
    with pytest.raises(ValueError, match="finite"):
        lora.file_and_scale("x.safetensors=nan")


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({A: np.zeros((0, 32), "f4"), B: np.zeros((32, 0), "f4")}, "rank 0"),
        ({A: np.zeros((4, 32), np.int8), B: ARRAYS[B]}, "int8"),
        ({**pair(Q), f"{Q}.alpha": np.array(np.nan)}, "NaN"),
        ({A: ARRAYS[A] * np.inf, B: ARRAYS[B]}, "NaN or infinity"),
    ],
)
def test_tensors_that_are_no_lora_s_are_refused(arrays, words):
    with pytest.raises(CheckpointError, match=words):
        lora.attach(model(), {"a": lora.from_arrays(arrays)})


# --- on a model ------------------------------------------------------------------------------------------------------


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
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "JAX_PLATFORMS": "cpu",
    }
    subprocess.run([sys.executable, __file__, str(tmp_path / "out.json")], env=environment, check=True)
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["a"] == [None, "fsdp", None]
    assert result["b"] == [None, None, "tensor"]
    assert result["new a"] == result["a"]
    assert result["weight"] == result["merged"] == [None, "fsdp", "tensor"]
    assert result["error"] < 5e-6


def on_eight() -> dict:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    base, files = model(stacked=True), {"a": lora.from_arrays({**pair(Q), **pair(PATCH)})}
    split = jax.device_put(base, shardings(base, mesh))
    expected = to_arrays(lora.merge(lora.attach(base, files)))
    adapted = lora.attach(split, files)
    new = lora.add(split, CONFIG, jax.random.key(0))
    merged = lora.merge(adapted)
    weights = to_arrays(merged)

    def spec(module, name):
        return list(getattr(module, name)[...].sharding.spec)

    return {
        "a": spec(adapted.blocks.attn1.to_q.adapters[0], "a"),
        "b": spec(adapted.blocks.attn1.to_q.adapters[0], "b"),
        "new a": spec(new.blocks.attn1.to_q.adapters[0], "a"),
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
    capsys.readouterr()
    assert main([*command, "--lora", f"{tmp_path}/b.safetensors=much"]) == 2
    assert main([*command, "--lora", f"{tmp_path}/c.safetensors"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 2
    assert "much" in error
    assert "no file" in error


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(on_eight()))
