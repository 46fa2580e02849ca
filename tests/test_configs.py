"""Every YAML of configs/ loads, runs chain up, and the 14B recipe has the numbers of upstream's scripts/training."""

import dataclasses
import re
from functools import cache
from pathlib import Path

import jax
import pytest
from flax import nnx

from helios_jax import config as configs
from helios_jax import lora
from helios_jax.ablations.table import read
from helios_jax.models.transformer import TransformerConfig
from helios_jax.precompute.encode import NEGATIVE_PROMPT
from helios_jax.sampling.run import SampleConfig
from helios_jax.training.run_config import ModelConfig, TrainConfig
from helios_jax.training.stage_table import load_config
from helios_jax.training.stages.distill.distill_config import DistillTrainConfig
from helios_jax.training.start import init_transformer
from helios_jax.training.trainable import AdapterConfig, dotted, trainable

ROOT = Path(__file__).parents[1]
FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml"))
STAGES = ("stage1_init", "stage1_post", "stage2_init", "stage2_post", "stage3_ode", "stage3_post", "stage3_gan")
RECIPE = [f"configs/{folder}{stage}.yaml" for folder in ("", "released/") for stage in STAGES]
# What no run makes: the embedded model in the layout that helios_jax.toy.wan gives it.
MADE = {"runs/toy-chain/wan"}
# What others build on.
NOT_RUNS = (
    "configs/stages.yaml",
    "configs/stage3.yaml",
    *(f"configs/{world}/{name}.yaml" for world in ("toy", "scenes") for name in ("base", "stages")),
)


def is_run(path: str) -> bool:
    return "stage" in Path(path).name or "vae" in path


@cache
def load(path: str) -> TrainConfig:
    return load_config(ROOT / path, ["stage=ode"] if path == "configs/stage3.yaml" else [])


@pytest.mark.parametrize("path", FILES)
def test_loads_and_says_its_command(path):
    header = (ROOT / path).read_text().split("\n\n")[0]
    if path.startswith("configs/ablations/"):
        read(ROOT / path)
        command = "-m helios_jax.ablations"
    elif path in NOT_RUNS or is_run(path):
        load(path)
        command = "train.py"
    else:
        configs.load(ROOT / path, [], SampleConfig)
        command = "sample.py"
    if path not in NOT_RUNS:
        assert f"{command} {path}" in header


@pytest.mark.parametrize("path", [path for path in FILES if is_run(path) and path not in NOT_RUNS])
def test_begins_with_what_another_run_makes(path):
    """An `init` or adapter in runs/ is the folder of a run of the same set, or a part of it."""
    config = load(path)
    made = {load(other).run for other in FILES if is_run(other) and Path(other).parent == Path(path).parent}
    score = config.distill.score if isinstance(config, DistillTrainConfig) else None
    for init in (config.init, *((score.init, *score.adapters) if score else ())):
        if init is not None and init.startswith("runs/"):
            assert re.sub(r"/(pipeline|vae|lora)$", "", init) in (made | MADE) - {config.run}
    assert list(made).count(config.run) == 1


def test_chain():
    for folder in ("", "released/"):
        runs = {stage: load(f"configs/{folder}{stage}.yaml") for stage in STAGES}
        for before, after in zip(STAGES, [*STAGES[1:6], "stage3_post"]):
            assert runs[after].init == f"{runs[before].run}/pipeline" or after == "stage3_post" == before
        assert runs["stage3_gan"].init == runs["stage3_post"].init
        assert runs["stage1_init"].init == "Wan-AI/Wan2.1-T2V-14B-Diffusers"
        for stage in ("stage3_post", "stage3_gan"):
            assert runs[stage].distill.score.init == f"{runs['stage1_post'].run}/pipeline"
        assert runs["stage3_ode"].data.folder != runs["stage2_post"].data.folder == runs["stage3_post"].data.folder
        assert len({config.run for config in runs.values()}) == len(STAGES)


# What upstream's files say: seed, learning rate, warm-up, beta 1, weight decay, clipping, rank, clips a device.
UPSTREAM = {
    "stage1_init": (43, 5e-5, 0, 0.9, 1e-4, 1.0, 128, 2),
    "stage1_post": (44, 3e-5, 0, 0.9, 1e-4, 1.0, 128, 2),
    "stage2_init": (45, 1e-4, 1000, 0.9, 1e-4, 1.0, 256, 1),
    "stage2_post": (46, 3e-5, 500, 0.9, 1e-4, 1.0, 256, 1),
    "stage3_ode": (47, 2e-6, 0, 0.0, 1e-3, 10.0, 256, 1),
    "stage3_post": (49, 2e-6, 0, 0.0, 1e-3, 1.0, 256, 1),  # clipping: zero2.json
    "stage3_gan": (49, 2e-6, 0, 0.0, 1e-3, 1.0, 256, 1),
}
DEVICES = 128


@pytest.mark.parametrize("path", RECIPE)
def test_numbers_of_upstream(path):
    config, stage = load(path), Path(path).stem
    optim = config.optim
    assert (optim.name, optim.schedule, optim.decayed) == ("adamw", "constant", "all")
    assert (optim.betas[1], optim.eps) == (0.999, 1e-8)
    found = (config.seed, optim.lr, optim.warmup_steps, optim.betas[0], optim.weight_decay, optim.clip_norm)
    assert (*found, config.lora.rank, config.data.batch_size / DEVICES) == UPSTREAM[stage]
    assert config.lora.alpha in (None, config.lora.rank)
    assert config.checkpoint.every == (250 if stage.startswith("stage3") else 500)
    assert config.precision == "bfloat16"
    assert config.remat == {"1": "products", "2": "some_products", "3": "some_products"}[stage[5]]

    flow = config.flow
    assert (flow.memory.long, flow.memory.mid, flow.memory.recent, flow.memory.frames_per_chunk) == (16, 2, 1, 9)
    assert flow.memory.anchor == "first"
    if stage != "stage3_ode":
        assert flow.text_drop == 0
    if not stage.startswith("stage3"):
        assert flow.times.shift is None
    if stage.startswith("stage1"):
        assert flow.pyramid is None
        times = flow.times
        assert (times.weighting, times.logit_mean, times.logit_std) == ("logit_normal", 0, 1)
    else:
        pyramid = flow.pyramid
        samples = [0, 1, 1, 2] if stage == "stage2_init" else [0, 1, 2]
        assert pyramid.passes() == ([samples] if stage.startswith("stage2") else [[0], [1], [2]])
        assert pyramid.stage_range == pytest.approx((0, 1 / 3, 2 / 3, 1))
        assert (pyramid.gamma, pyramid.timestep_shift) == (pytest.approx(1 / 3), 1)
        assert stage.startswith("stage3") or flow.times.weighting == "none"


@pytest.mark.parametrize("path", RECIPE)
def test_history_suffers_as_the_authors_say(path):
    """Their corrections (correct.yaml) in configs/, what they released in configs/released."""
    config, stage, released = load(path), Path(path).stem, "released" in path
    if stage == "stage3_ode":
        return  # its history is what the teacher made
    drop, corruption = config.flow.drop, config.flow.corruption
    assert (drop.t2v, drop.v2v) == (0.4, 0.5 if stage.startswith("stage3") else 0.4)
    assert drop.i2v == (0 if released else 0.1)
    assert (corruption.noise, corruption.clean, corruption.per) == (pytest.approx(1 / 3), 0.1, "frame")
    if released and stage != "stage3_gan":
        assert corruption.blur is None
    else:
        blur = corruption.blur
        assert (blur.probability, blur.smallest, blur.largest) == (0.1, 0.9, 1.0)
    if released and not stage.startswith("stage3"):
        assert corruption.saturation is None
    else:
        saturation = corruption.saturation
        assert (saturation.smallest, saturation.largest, saturation.clean) == (0.3, 1.7, 0.1)


@pytest.mark.parametrize("path", [path for path in RECIPE if "stage3" in path])
def test_numbers_of_stage_3(path):
    config, stage = load(path), Path(path).stem
    distill, ema = config.distill, config.optim.ema
    assert (distill.steps, distill.shift) == ((2, 2, 2), "linear")
    assert (ema.decay, ema.ramp) == (0.99, True)
    if stage == "stage3_ode":
        assert (config.stage, ema.start, ema.every, distill.ode_weight) == ("ode", 250, 1, 80)
        return
    assert (config.stage, ema.start, ema.every) == ("distill", 750, 5)
    critic, score = distill.critic, distill.score
    assert distill.amplify_first_chunk
    assert (distill.rollout.smallest, distill.rollout.largest) == (1, 1)
    assert (critic.optim.lr, critic.optim.betas, critic.optim.clip_norm) == (4e-7, (0.0, 0.999), 1)
    assert (critic.optim.weight_decay, critic.lora.rank, critic.steps_per_generator) == (1e-3, 256, 5)
    assert (critic.optim.name, critic.optim.decayed) == ("adamw", "all")
    assert critic.lora.target_modules == AdapterConfig().target_modules
    assert critic.renoise.distribution == "uniform"
    assert score.guidance_scale == 3
    renoise = score.renoise
    assert (renoise.distribution, renoise.alpha, renoise.beta, renoise.until) == ("beta", 4, 1.5, 500)
    gan = distill.gan
    if stage == "stage3_post":
        assert gan is None
        return
    assert (gan.start, gan.generator_weight, gan.critic_weight) == (1000, 5e-2, 1e-2)
    assert (gan.r1.weight, gan.r1.sigma, gan.r1.per_sigma, gan.r2, gan.crop) == (100, 0.1, False, None, 0.5)
    heads = gan.discriminator
    assert (heads.blocks, heads.output, heads.dim) == ((5, 15, 25, 35), True, 768)


PATCHES = {"patch_short", "patch_mid", "patch_long"}


@pytest.mark.parametrize("path", RECIPE)
def test_trains_what_upstream_trains(path):
    """Adapters on every linear layer, and patches: upstream's is_train_{full,lora}_{patch_embedding,multi_term...}."""
    config, stage = load(path), Path(path).stem
    config = dataclasses.replace(config, init=None, model=ModelConfig(TransformerConfig()))
    model = jax.eval_shape(lambda: init_transformer(config, jax.random.key(0)))
    adapted = {".".join(map(str, at)) for at, _ in lora.adapters.adapted(model)}
    linear = {".".join(map(str, at.path)) for at in lora.adapters.targets(model).values() if at.layout == "linear"}
    added = {
        "stage1": {"patch_embedding"},
        "stage2_init": set(),
        "stage2_post": {"patch_embedding", *PATCHES},
        "stage3": PATCHES,
    }
    assert adapted == linear | next(names for prefix, names in added.items() if stage.startswith(prefix))
    state = nnx.state(model, trainable(config.trainable))
    whole = {dotted(at) for at, v in nnx.to_flat_state(state) if not isinstance(v, lora.LoRAWeight)}
    expected = {f"{name}.{part}" for name in PATCHES for part in ("weight", "bias")}
    assert whole == (expected if stage.startswith("stage1") else set())
    assert ("discriminator" in config.trainable) == (stage == "stage3_gan")


@pytest.mark.parametrize("path", RECIPE)
def test_validation_videos_keep_away_from_what_sampling_does(path):
    validation = load(path).validation
    assert validation is not None
    assert validation.negative_prompt == NEGATIVE_PROMPT
