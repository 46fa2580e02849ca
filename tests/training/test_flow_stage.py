"""Stages 1 and 2 from pixels to a pipeline: precompute, losses, one batch overfitted, videos, export."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from helios_jax import HeliosPipeline, lora
from helios_jax.config import ConfigError
from helios_jax.data import shards
from helios_jax.data.records import EMPTY_TEXT, open_source, tensor, text
from helios_jax.diffusion.memory import MemoryConfig
from helios_jax.diffusion.schedule import SchedulerConfig
from helios_jax.models.transformer import Transformer
from helios_jax.precompute import cli as precompute
from helios_jax.precompute.encode import VideoEncoder
from helios_jax.pretrained import file_entries
from helios_jax.sampling.checkpoint import Checkpoint
from helios_jax.sharding import MeshConfig, make_mesh
from helios_jax.toy import build as toy_build
from helios_jax.trained import Levels, Trained
from helios_jax.training import pipeline_parts, start
from helios_jax.training.flow_config import FlowPyramidConfig
from helios_jax.training.loop import split_ids
from helios_jax.training.optim import OptimConfig, make_optimizer
from helios_jax.training.run_config import ValidationConfig
from helios_jax.training.stage_table import load_config
from helios_jax.training.stages import flow
from helios_jax.training.stages.flow import FlowStage
from helios_jax.training.state import create
from helios_jax.training.train_step import make_step
from helios_jax.training.trainable import AdapterConfig, dotted
from tests import tiny
from tests.closeness import assert_close


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("flow")
    tiny.folder(root / "pipeline")
    toy_build.build(root / "pixels", videos=4, test_videos=1, chunks=3, seed=0, size=32)
    arguments = ["--videos", root / "pixels", "--model", root / "pipeline", "--out", root / "latents"]
    assert precompute.main(list(map(str, arguments))) == 0
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
    config = load_config(path)
    config.model.transformer = tiny.TRANSFORMER
    return config


def draw() -> Transformer:
    """A model as the stage makes it, its values drawn without compiling each draw."""
    return tiny.draw(Transformer.abstract(tiny.TRANSFORMER, stacked=True), np.random.default_rng(0))


def test_init_makes_the_model_that_is_trained(config):
    made = jax.eval_shape(lambda: FlowStage(config).init(jax.random.key(0)))
    assert {k: e.shape for k, e in file_entries(made).items()} == {k: e.shape for k, e in file_entries(draw()).items()}


def test_latents_are_those_of_each_chunk_alone(folders):
    source = open_source(folders / "latents", "train")
    assert source[0]["latents"].shape == (3, 9, 4, 4, 4)
    encode = VideoEncoder(folders / "pipeline" / "vae").load()
    video = open_source(folders / "pixels", "train")[0]["video"]
    alone = next(encode([("", video[None, 33:66])]))
    np.testing.assert_allclose(source[0]["latents"][1], alone[0], atol=2e-3)
    assert source[0]["text"].shape == (16, 16)
    assert not np.load(folders / "latents" / EMPTY_TEXT)[1:].any()


def test_precompute_never_overwrites_and_names_what_is_missing(folders, capsys):
    arguments = ["--vae", f"{folders}/pipeline/vae", "--text", f"{folders}/pipeline"]
    other = ["--negative-prompt", "another"]
    assert precompute.main(["--videos", f"{folders}/pixels", *arguments, *other, "--out", f"{folders}/latents"]) == 2
    assert "already exists" in capsys.readouterr().err
    assert precompute.main(["--videos", f"{folders}/none", *arguments, "--out", f"{folders}/new"]) == 2
    error = capsys.readouterr().err
    assert "none" in error
    assert error.count("\n") == 1


def test_videos_of_several_sizes_are_in_one_run(config, tmp_path):
    """Each batch is of one size, and each size must fit the model."""

    def clip(height: int, width: int) -> dict:
        latents = np.zeros((2, 9, height, width, 4), np.float16)
        return {"latents": latents, "text": np.zeros((5, 16), np.float16), "id": f"{height}x{width}"}

    def make(items):
        for size in items:
            yield [clip(*size)]

    features = {"latents": tensor((None, 9, None, None, 4), np.float16), "text": tensor((5, 16), np.float16)}
    plan = shards.plan("train", {"16x8": [(16, 8)] * 6, "8x12": [(8, 12)] * 6}, 6)
    shards.run(shards.Build(tmp_path / "data", {**features, "id": text()}, plan, {}), make, "clips")
    np.save(tmp_path / "data" / EMPTY_TEXT, np.zeros((5, 16), np.float16))
    config.data.folder, config.flow.components = str(tmp_path / "data"), None
    found = FlowStage(config).batches(make_mesh(MeshConfig()))
    seen = [next(found)["target"].shape for _ in range(8)]
    assert set(seen) == {(4, 9, 16, 8, 4), (4, 9, 8, 12, 4)}
    config.flow.pyramid = FlowPyramidConfig()
    with pytest.raises(ConfigError, match="latents 12 wide, not a multiple of 8"):
        FlowStage(config).batches(make_mesh(MeshConfig()))


def batch_of(config) -> dict:
    return jax.tree.map(jnp.asarray, split_ids(next(FlowStage(config).batches(make_mesh(MeshConfig()))))[0])


def keys(count=4, seed=1):
    return jax.random.split(jax.random.key(seed), count)


def test_batches_name_their_clips(config):
    _, ids = split_ids(next(FlowStage(config).batches(make_mesh(MeshConfig()))))
    assert len(ids) == 4
    clip, _, chunk = ids[0].rpartition(" chunk ")
    assert clip in {example["id"] for example in open_source(config.data.folder, "train")}
    assert chunk in "012"


def test_processes_that_read_make_the_same_batches(config):
    found = []
    for workers in (0, 1):
        config.data.workers = workers
        batches = FlowStage(config).batches(make_mesh(MeshConfig()))
        batches.set_state({"next_index": 2})
        found.append(next(batches))
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("weighting", ["logit_normal", "sigma_sqrt"])
def test_loss_of_a_model_that_predicts_zero_is_the_target_s_square(config, weighting):
    config.flow.times.weighting = weighting
    batch, model = batch_of(config), draw()
    model.proj_out = jax.tree.map(jnp.zeros_like, model.proj_out)
    value, metrics = jax.jit(lambda m, b: FlowStage(config).loss(m, b, keys()))(model, batch)
    noise = jnp.stack([jax.random.normal(jax.random.fold_in(k, 3), batch["target"].shape[1:]) for k in keys()])
    k_time = jnp.stack([jax.random.fold_in(k, 2) for k in keys()])
    (sample,) = flow.make_samples(batch["target"], noise, k_time, config.flow)
    weight = sample.sigma**-2 if weighting == "sigma_sqrt" else jnp.ones(4)
    errors = weight * jnp.square(noise - batch["target"]).mean((1, 2, 3, 4))
    assert float(value) == pytest.approx(float(errors.mean()), rel=1e-5)
    for name, part in (("loss_noisy", sample.sigma > 0.5), ("loss_clean", sample.sigma <= 0.5)):
        total, count = metrics[name]
        assert float(total) == pytest.approx(float((errors * part).sum()), rel=1e-5)
        assert int(count) == int(part.sum())


def test_packed_and_separate_levels_have_one_loss_and_one_gradient(config):
    config.flow.times.weighting = "none"
    batch, model, found = batch_of(config), draw(), {}
    for levels in ("packed", "separate"):
        config.flow.pyramid = FlowPyramidConfig(sample_ratios=(2, 1), stage_range=(0, 0.5, 1), levels=levels)
        gradient = jax.value_and_grad(lambda m, b: FlowStage(config).loss(m, b, keys()), has_aux=True)
        found[levels] = jax.jit(gradient)(model, batch)
    assert_close(found["packed"], found["separate"])
    (value, metrics), _ = found["packed"]
    assert {name: int(count) for name, (_, count) in metrics.items()} == {"loss_level_0": 8, "loss_level_1": 4}
    sums = sum(float(total) for total, _ in metrics.values())
    assert float(value) == pytest.approx(sums / 12, rel=1e-5)


def test_a_level_that_is_left_out_has_neither_samples_nor_a_loss(config):
    config.flow.pyramid = FlowPyramidConfig(sample_ratios=(0, 2), stage_range=(0, 0.5, 1))
    batch = batch_of(config)
    samples = flow.make_samples(batch["target"], batch["target"] + 1, keys(), config.flow)
    assert [x.noisy.shape for x in samples] == [batch["target"].shape] * 2
    _, metrics = jax.eval_shape(lambda m: FlowStage(config).loss(m, batch, keys()), draw())
    assert list(metrics) == ["loss_level_1"]
    for wrong in ((0, 0, 0), (1, -1, 1)):
        with pytest.raises(ValueError, match="from 0 up, one per level and not all 0"):
            FlowPyramidConfig(sample_ratios=wrong)


def test_samples_of_a_level_have_times_of_their_own(config):
    flow_config = dataclasses.replace(config.flow, pyramid=FlowPyramidConfig())
    target = jnp.asarray(np.random.default_rng(0).standard_normal((4, 1, 8, 8, 4), np.float32))
    samples = flow.make_samples(target, target + 1, keys(), flow_config)
    assert [x.noisy.shape[2] for x in samples] == [2, 4, 4, 8]
    assert len({float(x.sigma[0]) for x in samples}) == 4
    np.testing.assert_array_equal(samples[1].target, samples[2].target)
    assert (samples[0].timestep > samples[1].timestep).all()
    assert (samples[2].timestep > samples[3].timestep).all()


def test_bfloat16_computes_near_float32_with_gradients_in_float32(config):
    batch, model = batch_of(config), draw()
    config.flow.drop = config.flow.corruption = None
    values = {}
    for precision in ("float32", "bfloat16"):
        config.precision = precision
        (values[precision], _), grads = jax.jit(
            jax.value_and_grad(lambda m: FlowStage(config).loss(m, batch, keys()), has_aux=True)
        )(model)
        assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    assert float(values["bfloat16"]) == pytest.approx(float(values["float32"]), rel=2e-2)
    assert float(values["bfloat16"]) != float(values["float32"])


LORA = AdapterConfig(rank=4, target_modules=("to_q", "ffn.net.2", "patch_embedding"))


@pytest.mark.parametrize(
    ("change", "trained"),
    [
        pytest.param({}, lambda name: True, marks=pytest.mark.heavy),  # stage 2 learns by the same step
        ({"pyramid": FlowPyramidConfig(sample_ratios=(1, 1), stage_range=(0, 0.5, 1))}, lambda name: True),
        pytest.param(
            {"lora": LORA, "trainable": ("adapters", "patch_(short|mid|long)")},
            lambda name: name.endswith((".a", ".b")) or name.startswith(("patch_short", "patch_mid", "patch_long")),
            marks=pytest.mark.heavy,  # test_saved tells what moves
        ),
    ],
    ids=["stage 1", "stage 2", "adapters and memory patches"],
)
def test_one_batch_is_learnt_by_the_parameters_that_train_alone(config, change, trained):
    config.flow.drop = config.flow.corruption = None
    config.flow.pyramid = change.pop("pyramid", None)
    config = dataclasses.replace(config, **change, optim=OptimConfig(lr=1e-2, weight_decay=0.0))
    batch, mesh = batch_of(config), make_mesh(config.mesh)
    model = draw() if config.lora is None else start._add_adapters(draw(), config.lora, 0)
    optimizer = make_optimizer(config.optim, 100)
    state = create(model, optimizer, None, config.trainable)
    begin = dict(nnx.to_flat_state(nnx.state(model)))
    # The same times and noise each step: the key follows from the step, which is set back.
    step, losses = make_step(FlowStage(config), optimizer, state, mesh), []
    begin = {path: np.array(variable.get_value()) for path, variable in begin.items()}
    for _ in range(100):
        state, metrics = step(state.replace(step=jnp.zeros((), jnp.int32)), batch, jax.random.key(2))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.3 * losses[0], losses[::10]
    for path, variable in nnx.to_flat_state(nnx.state(state.model)):
        moved = bool((np.asarray(variable.get_value()) != begin[path]).any())
        assert moved == trained(dotted(path)), path


def test_export_is_a_whole_pipeline_with_adapters_merged_and_alone(config, tmp_path):
    config = dataclasses.replace(config, lora=LORA, trainable=("adapters",))
    config.flow.pyramid = FlowPyramidConfig()
    config.flow.memory = MemoryConfig(long=0, mid=0, recent=4, anchor=None, positions="absolute")
    model = start._add_adapters(draw(), LORA, 0)
    model.blocks.ffn.down.adapters[0].b[...] += 1.0
    FlowStage(config).export(model, tmp_path)
    checkpoint = Checkpoint.open(tmp_path / "pipeline")
    assert dataclasses.asdict(checkpoint.transformer) == dataclasses.asdict(tiny.TRANSFORMER)
    assert checkpoint.variant.pyramid
    assert checkpoint.variant.is_cfg_zero_star
    assert checkpoint.scheduler.stages == 3
    levels = Levels((0, 1 / 3, 2 / 3, 1), 1 / 3)
    assert checkpoint.variant.trained == Trained(config.flow.memory, kind="mid", levels=levels)
    unaware = dataclasses.replace(checkpoint, variant=dataclasses.replace(checkpoint.variant, trained=Trained()))
    assert unaware.with_loras({"trained": lora.read(tmp_path / "lora").metadata}).variant == checkpoint.variant
    merged = checkpoint.load_transformer(jnp.float32, stacked=True)
    attached = lora.attach(draw(), {"trained": tmp_path / "lora"})
    expected = lora.merge(attached).blocks.ffn.down.weight[...]
    assert np.abs(np.asarray(expected) - np.asarray(draw().blocks.ffn.down.weight[...])).max() > 0.1
    np.testing.assert_allclose(merged.blocks.ffn.down.weight[...], expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_an_exported_pyramid_is_the_run_s_and_its_solver_the_components(config, shift):
    levels = {"stage_range": (0, 0.2, 0.5, 1), "gamma": 0.2}
    config.flow.pyramid = FlowPyramidConfig(**levels, timestep_shift=shift)
    theirs = SchedulerConfig(scheduler_type="euler", use_dynamic_shifting=True)
    made = pipeline_parts.scheduler(config, theirs)
    assert (made.stage_range, made.gamma, made.scheduler_type) == (*levels.values(), "euler")
    assert (made.shift, made.use_dynamic_shifting) == (shift, shift == 1)


def spied(function, seen: list):
    """`function`, whose positional arguments are kept in `seen`."""

    def call(*args, **kwargs):
        seen.append(args)
        return function(*args, **kwargs)

    return call


def test_validation_writes_a_video_of_each_prompt_with_the_run_s_memory(config, tmp_path, monkeypatch):
    config.flow.memory = MemoryConfig(long=0, mid=0, recent=4, anchor=None, positions="absolute")
    config.validation = ValidationConfig(
        prompts=("a red square", "a blue plus"), num_frames=34, height=32, width=48, num_inference_steps=1, fps=8
    )
    monkeypatch.setattr(HeliosPipeline, "prepare", spied(HeliosPipeline.prepare, plans := []))
    stage = FlowStage(config)
    pictures = stage.validate(draw(), tmp_path / "videos", lambda: False)
    assert [args[3].memory for args in plans] == [config.flow.memory]
    assert sorted(p.name for p in (tmp_path / "videos").iterdir()) == ["0.mp4", "1.mp4"]
    assert {name: x.shape for name, x in pictures.items()} == {"0": (34, 32, 48, 3), "1": (34, 32, 48, 3)}
    assert not np.array_equal(pictures["0"], pictures["1"])

    # The texts are known now. A signal after the second of two chunks leaves out the videos.
    monkeypatch.setattr(Checkpoint, "load_text_encoder", lambda *_: pytest.fail("the text encoder was loaded again"))
    asked = []
    assert stage.validate(draw(), tmp_path / "more", lambda: asked.append(0) or len(asked) == 2) == {}
    assert len(asked) == 2
    assert not (tmp_path / "more").exists()
    again = stage.validate(draw(), tmp_path / "more", lambda: (tmp_path / "more" / "0.mp4").exists())
    np.testing.assert_array_equal(again.pop("0"), pictures["0"])
    assert again == {}


def test_what_cannot_be_is_one_line(config):
    cases = [
        ({"validation": ValidationConfig(prompts=("x",), height=30)}, {}, r"validation: height must be a multiple"),
        ({"validation": ValidationConfig(prompts=("x",))}, {"components": None}, "validation: needs flow.components"),
        ({}, {"components": "nowhere"}, r"flow\.components: no folder nowhere"),
    ]
    for change, flow_change, message in cases:
        wrong = dataclasses.replace(config, **change, flow=dataclasses.replace(config.flow, **flow_change))
        with pytest.raises(ConfigError, match=message):
            FlowStage(wrong).batches(make_mesh(MeshConfig()))
    config.flow.pyramid = FlowPyramidConfig()
    with pytest.raises(ConfigError, match=r"latents 4 high, not a multiple of 8, which 3 levels in patches of 2 need"):
        FlowStage(config).batches(make_mesh(MeshConfig()))
    config.data.folder = "nowhere"
    with pytest.raises(ConfigError, match=r"data\.folder: nowhere"):
        FlowStage(config).batches(make_mesh(MeshConfig()))
    config.model.transformer = dataclasses.replace(tiny.TRANSFORMER, in_channels=8)
    with pytest.raises(ConfigError, match=r"flow\.components: .*transformer in_channels 8 is not vae z_dim 4"):
        FlowStage(config).batches(make_mesh(MeshConfig()))
