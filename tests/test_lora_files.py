"""LoRA files: what they may hold, where they are found, and what is refused."""

import warnings
from functools import partial

import huggingface_hub
import numpy as np
import pytest
from safetensors.numpy import save_file

from helios_jax import lora
from helios_jax.models.transformer import Transformer
from helios_jax.pretrained import CheckpointError, to_arrays
from tests import fake_hub, tiny
from tests.closeness import assert_close
from tests.tiny_lora import ARRAYS, FFN, PATCH, A, B, Q, model, pair


def broken(change):
    arrays = dict(ARRAYS)
    change(arrays)
    return arrays


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


def test_changes_of_modulation_are_ignored_and_said_unless_they_are_zero():
    key = f"diffusion_model.{Q}.diff_m"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora.attach(model(), {"a": lora.from_arrays({**ARRAYS, key: np.zeros(6, np.float32)})})
    with pytest.warns(UserWarning, match=rf"ignored what it changes in {Q}"):
        lora.attach(model(), {"a": lora.from_arrays({**ARRAYS, key: np.ones(6, np.float32)})})


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

    files = ["a/b.safetensors", "two.safetensors"]
    monkeypatch.setattr(huggingface_hub, "model_info", partial(fake_hub.info, files=files))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file, revision: tmp_path / file)
    assert lora.read("someone/style").changes.keys() == {Q}
    assert lora.read("someone/style/one.safetensors").changes.keys() == {Q, FFN, PATCH}
    for name, message in (("nowhere.safetensors", "no file"), ("nowhere", "no folder"), (tmp_path / "x", "no folder")):
        with pytest.raises(CheckpointError, match=message):
            lora.read(name)


@pytest.mark.parametrize(
    "prefix", ["model.diffusion_model.", "_orig_mod.", "lora_unet__", "base_model.model._orig_mod."]
)
def test_prefixes_and_other_parts_of_files_in_circulation(prefix):
    arrays = {key.replace("transformer.", prefix): value for key, value in ARRAYS.items()}
    for name in ("k_img", "v_img"):
        for part, shape in (("down", (2, 3)), ("up", (3, 2))):
            arrays[f"diffusion_model.blocks.0.cross_attn.{name}.lora_{part}.weight"] = np.zeros(shape, np.float32)
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
