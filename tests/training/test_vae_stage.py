"""The vae stage on a tiny autoencoder and a tiny dataset: it learns, exports, and says what is wrong."""

import json

import jax
import numpy as np
import pytest
import yaml
from flax import nnx
from PIL import Image

import train
from helios_jax import pretrained
from helios_jax.config import ConfigError
from helios_jax.models.vae import AutoencoderKLWan, VAEConfig
from helios_jax.sharding import MeshConfig, make_mesh
from helios_jax.toy import build as toy_build
from helios_jax.training.stage_table import load_config
from helios_jax.training.stages import vae
from helios_jax.training.stages.vae import VAEStage

SIZES = {"base_dim": 4, "z_dim": 2, "dim_mult": [1, 1], "num_res_blocks": 1, "temperal_downsample": [True]}
STATISTICS = {"latents_mean": [0, 0], "latents_std": [1, 1]}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    toy_build.build(folder / "data", videos=6, test_videos=4, chunks=1, seed=0, size=16)
    values = {
        "stage": "vae",
        "run": str(folder / "run"),
        "steps": 8,
        "log_every": 4,
        "precision": "float32",
        "model": {"vae": {**SIZES, **STATISTICS}},
        "data": {"folder": str(folder / "data"), "batch_size": 4, "frames": 5, "crop": 8},
        "optim": {"lr": 3e-3},
    }
    (folder / "c.yaml").write_text(yaml.safe_dump(values))
    return folder / "c.yaml"


def test_trains_and_exports(config):
    assert train.main([str(config)]) == 0
    run = config.parent / "run"
    losses = [json.loads(x)["loss"] for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    measured = pretrained.read_config(run / "vae", VAEConfig)
    report = json.loads((run / "vae.json").read_text())
    assert report["clips"] == 4
    assert report["frames"] == vae.CHUNK
    np.testing.assert_allclose(measured.latents_std, report["latents_std"])
    assert Image.open(run / "vae.png").size == (9 * 16, 8 * 16)
    # The statistics are those of the exported weights, and a new run can start from them.
    model = jax.eval_shape(lambda: AutoencoderKLWan(measured, rngs=nnx.Rngs(0)))
    model = pretrained.load_model(model, run / "vae")
    encode = jax.jit(lambda m, v: m.encode(vae.to_float(v))[0])
    latents = [np.asarray(encode(model, v)) for v in vae.first_chunks(load_config(config).data, "train", 6)]
    np.testing.assert_allclose(np.concatenate(latents).mean((0, 1, 2, 3)), measured.latents_mean, atol=1e-5)
    stage = VAEStage(load_config(config, [f"init={run}"]))
    started = stage.load(jax.eval_shape(lambda: stage.init(jax.random.key(1))))
    assert np.array_equal(started.decoder.conv_in.weight[...], model.decoder.conv_in.weight[...])


def test_batches_are_crops_of_clips_without_text(config):
    batch = next(VAEStage(load_config(config)).batches(make_mesh(MeshConfig())))
    assert set(batch) == {"video"}
    assert batch["video"].shape == (4, 5, 8, 8, 3)
    whole = next(VAEStage(load_config(config, ["data.crop=null", "data.frames=33"])).batches(make_mesh(MeshConfig())))
    assert whole["video"].shape == (4, 33, 16, 16, 3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.vae=null"], "model.vae: the vae stage needs its sizes"),
        (["data.folder=nowhere"], "data.folder: nowhere does not exist"),
        (["model.vae.z_dim=3"], "latents_mean"),
        (["data.crop=12"], "multiple of 8"),
        (["validation={prompts: [x]}"], "validation must be null"),
    ],
)
def test_bad_input(config, overrides, message):
    with pytest.raises(ConfigError) as e:
        VAEStage(load_config(config, overrides)).batches(make_mesh(MeshConfig()))
    assert message in str(e.value)
    assert "\n" not in str(e.value)
