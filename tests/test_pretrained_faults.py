"""Faults of weights, configs, indexes and the hub: each is refused in one line that names it."""

import json

import httpx2 as httpx
import huggingface_hub
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from huggingface_hub import errors
from safetensors.numpy import load_file, save_file

from helios_jax.diffusion.schedule import SchedulerConfig
from helios_jax.models.transformer import TransformerConfig
from helios_jax.models.umt5 import UMT5Config
from helios_jax.models.vae import VAEConfig
from helios_jax.pretrained import (
    CheckpointError,
    files,
    from_arrays,
    read_config,
    read_json,
    resolve,
    to_arrays,
    write_config,
)
from helios_jax.pretrained.folder import weight_files
from helios_jax.pretrained.hub import from_hub
from helios_jax.sampling.checkpoint import Checkpoint
from tests import tiny

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
CONFIGS = {
    "transformer/config.json": TransformerConfig,
    "vae/config.json": VAEConfig,
    "text_encoder/config.json": UMT5Config,
    "scheduler/scheduler_config.json": SchedulerConfig,
}


@pytest.fixture
def folder(changeable):
    return changeable


def refused(call, *words):
    """Calls `call`, which must raise `CheckpointError` in one line with `words`."""
    with pytest.raises(CheckpointError) as error:
        call()
    assert all(str(word) in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def change(path, key, make):
    tensors = load_file(path)
    tensors[key] = make(tensors[key])
    save_file(tensors, path)


# --- NaN and infinity ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", files.INFINITY)
def test_nan_and_infinity_are_found_in_every_dtype(bad, dtype):
    finite = [0, -0.0, float(ml_dtypes.finfo(dtype).max), float(ml_dtypes.finfo(dtype).min)]
    files.check_finite(np.array(finite, dtype), "f", "x")
    with np.errstate(all="ignore"):
        values = np.array([*finite, bad, 1], dtype)
    refused(lambda: files.check_finite(values, "f.safetensors", "x"), "f.safetensors", "x holds NaN or infinity")


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("part", "file", "key"),
    [
        ("transformer", WEIGHTS, "blocks.1.ffn.net.2.weight"),
        ("vae", WEIGHTS, "quant_conv.bias"),
        ("text_encoder", "model.safetensors", "shared.weight"),
    ],
)
def test_a_weight_that_is_not_finite_is_refused_as_it_loads(folder, part, file, key, dtype):
    def spoil(values):
        values = values.astype(dtype)
        values.reshape(-1)[-1] = np.nan
        return values

    change(folder / part / file, key, spoil)
    checkpoint = Checkpoint.open(folder)
    load = {
        "transformer": lambda dtype: checkpoint.load_transformer(dtype, stacked=True),
        "vae": checkpoint.load_vae,
        "text_encoder": checkpoint.load_text_encoder,
    }[part]
    for into in (jnp.float32, jnp.bfloat16):
        refused(lambda into=into: load(into), folder / part / file, f"{key} holds NaN")


def test_a_value_that_overflows_the_model_s_dtype_is_refused(tmp_path):
    save_file({"x": np.array([1e39])}, tmp_path / WEIGHTS)
    tensor = files.read_headers(tmp_path)["x"]
    assert tensor.read() == 1e39
    with np.errstate(over="ignore"):
        refused(lambda: tensor.read(dtype=np.float32), WEIGHTS, "as float32")


def test_arrays_are_checked_too():
    arrays = to_arrays(tiny.pipeline().vae)
    arrays["quant_conv.bias"] = arrays["quant_conv.bias"] * np.inf
    model = tiny.pipeline().vae
    refused(lambda: from_arrays(model, arrays), "the mapping: quant_conv.bias")


# --- configs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "key", "value", "rule"),
    [
        ("vae/config.json", "latents_mean", [0, 0, 0, float("nan")], "NaN"),
        ("vae/config.json", "latents_std", [1, 1, 1, float("inf")], "infinity"),
        ("vae/config.json", "dim_mult", [1, -1, 1, 1], "positive"),
        ("vae/config.json", "temperal_downsample", [0, 1, 1], "true or false"),
        ("vae/config.json", "num_res_blocks", 10**6, "at most 50"),
        ("vae/config.json", "decoder_base_dim", -3, "positive"),
        ("scheduler/scheduler_config.json", "num_train_timesteps", -1, "positive"),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 0, "positive"),
        ("scheduler/scheduler_config.json", "num_train_timesteps", True, "whole number"),
        ("scheduler/scheduler_config.json", "gamma", float("nan"), "NaN"),
        ("scheduler/scheduler_config.json", "stage_range", [0, -1], "negative"),
        ("scheduler/scheduler_config.json", "stages", 10**9, "at most 75"),
        ("scheduler/scheduler_config.json", "_class_name", "DDIMScheduler", "HeliosScheduler"),
        ("transformer/config.json", "_class_name", "WanTransformer3DModel", "HeliosTransformer3DModel"),
        ("transformer/config.json", "num_layers", 10**6, "at most 1000"),
        ("transformer/config.json", "num_layers", 2.5, "whole number"),
        ("transformer/config.json", "rope_theta", 0, "positive"),
        ("transformer/config.json", "eps", "small", "a number"),
        ("transformer/config.json", "patch_size", [1] * 10**5, "at most 75 entries"),
        ("transformer/config.json", "cross_attn_norm", "no", "true or false"),
        ("text_encoder/config.json", "num_heads", -4, "positive"),
        ("text_encoder/config.json", "model_type", "t5", "umt5"),
    ],
)
def test_a_value_that_no_model_can_have_is_refused(folder, file, key, value, rule):
    values = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**values, key: value}))
    refused(lambda: Checkpoint.open(folder), folder / file, key, rule)


@pytest.mark.parametrize("text", [b"[]", b"null", b"3", b"[" * 10**5, b'{"a": ' * 10**5, b"\xff\xfe", b"", b"9" * 5000])
@pytest.mark.parametrize("file", CONFIGS)
def test_a_config_that_is_no_object_is_refused(folder, file, text):
    (folder / file).write_bytes(text)
    refused(lambda: Checkpoint.open(folder), folder / file)


@pytest.mark.parametrize("file", CONFIGS)
def test_a_folder_in_place_of_a_config_is_refused(folder, file):
    (folder / file).unlink()
    (folder / file).mkdir()
    refused(lambda: read_json(folder / file), folder / file, "cannot be read")


def test_configs_of_the_released_sizes_are_read(tmp_path):
    for cls in CONFIGS.values():
        write_config(cls(), tmp_path)
        assert read_config(tmp_path, cls) == cls()


# --- indexes and kinds of weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "index",
    [
        {}, [], None, {"weight_map": None}, {"weight_map": ["a.safetensors"]}, {"weight_map": {}},
        {"weight_map": {"x": ["a.safetensors"]}}, {"weight_map": {"x": "../../secret.safetensors"}},
        {"weight_map": {"x": "/secret.safetensors"}}, {"weight_map": {"x": "a\0.safetensors"}},
        {"weight_map": {"x": "a.bin"}},
    ],
)  # fmt: skip
def test_an_index_that_names_no_files_of_its_folder_is_refused(tmp_path, index):
    (tmp_path / INDEX).write_text(json.dumps(index))
    refused(lambda: weight_files(tmp_path), INDEX)


def test_an_index_may_name_links(tmp_path):
    (tmp_path / "blobs").mkdir()
    save_file({"x": np.zeros(2, np.float32)}, tmp_path / "blobs" / "1")
    part = tmp_path / "part"
    part.mkdir()
    (part / "a.safetensors").symlink_to(tmp_path / "blobs" / "1")
    (part / INDEX).write_text(json.dumps({"weight_map": {"x": "a.safetensors"}}))
    assert files.read_headers(part).keys() == {"x"}


@pytest.mark.parametrize(
    ("dtype", "words"),
    [(np.int8, "quantised"), (np.bool_, "quantised"), (np.int64, "quantised"), (jnp.float8_e4m3fn, "fp8 weights")],
)
def test_weights_that_are_not_floating_are_refused(folder, dtype, words):
    change(folder / "transformer" / WEIGHTS, "proj_out.bias", lambda x: np.zeros(x.shape, dtype))
    refused(
        lambda: Checkpoint.open(folder), folder / "transformer", "proj_out.bias", np.dtype(dtype), words, "bfloat16"
    )


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("blocks.0.attn1.to_q.scale_weight", "fp8 weights"),
        ("model.diffusion_model.blocks.0.self_attn.q.weight", "single-file checkpoint"),
        ("blocks.0.self_attn.q.weight", "from_single_file"),
    ],
)
def test_other_kinds_of_checkpoints_are_named(folder, key, words):
    path = folder / "transformer" / WEIGHTS
    save_file({**load_file(path), key: np.zeros(2, np.float32)}, path)
    refused(lambda: Checkpoint.open(folder), folder / "transformer", words)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("diffusion_pytorch_model.fp16.safetensors", "variant fp16"),
        ("diffusion_pytorch_model.fp16-00001-of-00002.safetensors", "variant fp16"),
        ("diffusion_pytorch_model.bin", "not a safetensors file"),
        ("wan.safetensors", "single-file checkpoint"),
    ],
)
def test_weights_of_another_name_are_named(folder, name, words):
    (folder / "vae" / WEIGHTS).rename(folder / "vae" / name)
    refused(lambda: Checkpoint.open(folder), "no weights", name, words)


def test_a_file_in_place_of_a_folder_is_named(folder):
    path = folder / "transformer" / WEIGHTS
    refused(lambda: resolve(path), path, "not a diffusers folder", "from_single_file")


def test_the_config_is_blamed_for_sizes_only(folder):
    path = folder / "transformer" / WEIGHTS
    tensors = load_file(path)
    blame = "does not fit its config.json"
    save_file({k: v for k, v in tensors.items() if k != "proj_out.bias"}, path)
    with pytest.raises(CheckpointError, match=r"lacks proj_out\.bias") as error:
        Checkpoint.open(folder)
    assert "config.json" not in str(error.value)
    save_file({k: v for k, v in tensors.items() if not k.startswith("blocks.1.")}, path)
    refused(lambda: Checkpoint.open(folder), blame)
    save_file({**tensors, "proj_out.bias": np.zeros(3, np.float32)}, path)
    refused(lambda: Checkpoint.open(folder), blame)
    arrays = {**to_arrays(tiny.pipeline().vae), "quant_conv.bias": np.zeros(3, np.float32)}
    with pytest.raises(CheckpointError, match="the mapping does not fit the model"):
        from_arrays(tiny.pipeline().vae, arrays)


# --- the hub ---------------------------------------------------------------------------------------------------------


def http(cls):
    response = httpx.Response(404, request=httpx.Request("GET", "https://huggingface.co/a/b"))
    return cls("404 Client Error.\n\nMany lines.", response=response)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (http(errors.GatedRepoError), "gated"),
        (http(errors.RepositoryNotFoundError), "no such repository"),
        (http(errors.RevisionNotFoundError), "no such revision"),
        (http(errors.RemoteEntryNotFoundError), "no such file"),
        (http(errors.HfHubHTTPError), "404 Client Error"),
        (errors.LocalEntryNotFoundError("a\nb"), "cannot be reached"),
        (errors.OfflineModeIsEnabled("a\nb"), "HF_HUB_OFFLINE"),
        (httpx.ConnectError("[Errno -3] Temporary failure\nin name resolution"), "ConnectError"),
        (httpx.ReadTimeout(""), "ReadTimeout"),
        (errors.HFValidationError("Repo id\nis bad"), "Repo id is bad"),
        (OSError(28, "No space left on device"), "No space left"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_every_error_of_the_hub_is_one_line(error, words):
    def ask():
        raise error

    refused(lambda: from_hub("a/b", ask), "a/b", words)


def test_subfolders_of_a_cached_repository_are_named_offline(folder, monkeypatch):
    def offline(name, **_):
        raise errors.OfflineModeIsEnabled("offline")

    monkeypatch.setattr(huggingface_hub, "model_info", offline)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(folder))
    refused(lambda: Checkpoint.open("a/b", transformer="transformer_odd"), "it has transformer")
