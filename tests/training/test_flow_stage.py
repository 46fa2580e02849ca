"""Stage 1 from pixels to a pipeline: precompute, loss, one batch overfitted, export."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helios_jax import config as configs
from helios_jax.config import ConfigError
from helios_jax.data import precompute, toy_build
from helios_jax.data.records import open_source
from helios_jax.models.transformer import Transformer
from helios_jax.pretrained import file_entries
from helios_jax.sampling.checkpoint import Checkpoint
from helios_jax.training.config import TrainConfig
from helios_jax.training.stages import flow
from tests import tiny


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("flow")
    tiny.folder(root / "pipeline")
    toy_build.build(root / "pixels", videos=4, test_videos=1, chunks=3, seed=0, size=16)
    precompute.build(root / "pixels", root / "pipeline" / "vae", root / "pipeline", root / "latents")
    return root


@pytest.fixture
def config(folders, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"""
stage: flow
run: {tmp_path}/run
steps: 10
precision: float32
data: {{folder: {folders}/latents, batch_size: 4}}
flow: {{components: {folders}/pipeline, text_drop: 0.5}}
""")
    config = configs.load(path, [], TrainConfig)
    config.model.transformer = tiny.TRANSFORMER
    return config


def draw() -> Transformer:
    """A model as the stage makes it, its values drawn without compiling each draw."""
    return tiny.draw(Transformer.abstract(tiny.TRANSFORMER, stacked=True), np.random.default_rng(0))


def test_init_makes_the_model_that_is_trained(config):
    made = jax.eval_shape(lambda: flow.init(config, jax.random.key(0)))
    assert {k: e.shape for k, e in file_entries(made).items()} == {k: e.shape for k, e in file_entries(draw()).items()}


def test_latents_are_those_of_each_chunk_alone(folders):
    source = open_source(folders / "latents", "train")
    assert source[0]["latents"].shape == (3, 9, 2, 2, 4)
    encoders = precompute.Encoders(folders / "pipeline" / "vae", folders / "pipeline", None)
    video = open_source(folders / "pixels", "train")[0]["video"]
    alone = encoders.latents(video[33:66], 33)
    np.testing.assert_allclose(source[0]["latents"][1], alone[0], atol=2e-3)
    assert source[0]["text"].shape == (16, 16)
    assert not np.load(folders / "latents" / precompute.EMPTY_TEXT)[1:].any()


def test_precompute_never_overwrites_and_names_what_is_missing(folders, capsys):
    arguments = ["--vae", f"{folders}/pipeline/vae", "--text", f"{folders}/pipeline"]
    assert precompute.main(["--videos", f"{folders}/pixels", *arguments, "--out", f"{folders}/latents"]) == 2
    assert "already exists" in capsys.readouterr().err
    assert precompute.main(["--videos", f"{folders}/none", *arguments, "--out", f"{folders}/new"]) == 2
    error = capsys.readouterr().err
    assert "none" in error
    assert error.count("\n") == 1


def test_loss_of_a_model_that_predicts_zero_is_the_target_s_square(config):
    batch = jax.tree.map(jnp.asarray, next(flow.batches(config)))
    model = draw()
    model.proj_out = jax.tree.map(jnp.zeros_like, model.proj_out)
    key = jax.random.key(1)
    value, metrics = jax.jit(lambda m, b: flow.loss(m, b, key, config))(model, batch)
    noise = jax.random.normal(jax.random.split(key, 4)[3], batch["target"].shape)
    assert float(value) == pytest.approx(float(jnp.square(noise - batch["target"]).mean()), rel=1e-5)
    assert set(metrics) == {"loss_noisy", "loss_clean"}


def test_every_parameter_moves_and_one_batch_is_learnt(config):
    config.flow.drop = config.flow.corruption = None
    batch = jax.tree.map(jnp.asarray, next(flow.batches(config)))
    model = draw()
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(model, state):
        # One key: the same times and noise each step.
        (value, _), grads = jax.value_and_grad(flow.loss, has_aux=True)(model, batch, jax.random.key(2), config)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(model, updates), state, value

    state, trained, losses = jax.jit(optimizer.init)(model), model, []
    for _ in range(60):
        trained, state, value = step(trained, state)
        losses.append(float(value))
    assert losses[-1] < 0.25 * losses[0]
    for (path, before), after in zip(jax.tree.leaves_with_path(model), jax.tree.leaves(trained)):
        assert np.abs(np.asarray(before) - np.asarray(after)).max() > 0, jax.tree_util.keystr(path)


def test_times_fall_on_the_schedule():
    sigma = np.asarray(flow.draw_sigma(jax.random.key(0), 20000, 0.0, 1.0))
    assert sigma.max() <= 0.999
    assert sigma.min() >= 0
    np.testing.assert_allclose(sigma / 0.000999, np.round(sigma / 0.000999), atol=1e-2)
    assert np.median(sigma) == pytest.approx(0.5, abs=0.02)
    assert (sigma > 0.731).mean() == pytest.approx(0.1587, abs=0.01)  # one deviation of the logit


def test_export_is_a_whole_pipeline(config, tmp_path):
    model = draw()
    flow.export(model, config, tmp_path)
    checkpoint = Checkpoint.open(tmp_path / "pipeline")
    assert dataclasses.asdict(checkpoint.transformer) == dataclasses.asdict(tiny.TRANSFORMER)


def test_missing_data_and_components_are_one_line(config):
    config.data.folder = "nowhere"
    with pytest.raises(ConfigError, match=r"data\.folder: nowhere"):
        flow.batches(config)
    config.flow.components = "nowhere"
    with pytest.raises(ConfigError, match=r"flow\.components: nowhere has no vae"):
        flow.batches(config)
