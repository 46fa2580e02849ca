"""Sampling follows the settings that a transformer was trained with; options override them by name."""

import dataclasses
import json
import warnings
from typing import Any

import numpy as np
import pytest

from helios_jax.diffusion.memory import MemoryConfig
from helios_jax.diffusion.schedule import DMDSchedulerConfig, SchedulerConfig, level_ranges
from helios_jax.models.transformer import TransformerConfig
from helios_jax.models.vae import VAEConfig
from helios_jax.pretrained import CheckpointError
from helios_jax.sampling.checkpoint import Checkpoint
from helios_jax.sampling.options import SamplingOptions
from helios_jax.sampling.plan import Variant, make_plan
from helios_jax.trained import METADATA, Levels, Trained, with_loras
from tests import tiny

ABSOLUTE = MemoryConfig(positions="absolute", frames_per_chunk=3)
ONE_SCALE = MemoryConfig(long=0, mid=0, recent=4, anchor=None, frames_per_chunk=3)
SIZE = {"height": 64, "width": 64}
THIRDS = Levels((0, 1 / 3, 2 / 3, 1), 1 / 3)  # of the released pyramid
HALVES = Levels((0, 0.5, 1), 1 / 3)
STUDENT = Variant(pyramid=True, is_distilled=True, trained_size=(64, 64))


def plan_of(trained: Trained, variant: Variant | None = None, **options: Any):
    variant = dataclasses.replace(variant or Variant(trained_size=(64, 64)), trained=trained)
    scheduler: Any = SchedulerConfig(stages=1, stage_range=(0.0, 1.0), use_dynamic_shifting=True)
    if variant.pyramid:
        scheduler = DMDSchedulerConfig() if variant.is_distilled else SchedulerConfig()
    return make_plan(tiny.TRANSFORMER, tiny.VAE, scheduler, variant, SamplingOptions(**SIZE, **options))


@pytest.mark.parametrize("memory", [ABSOLUTE, ONE_SCALE, MemoryConfig()], ids=["absolute", "one scale", "released"])
def test_a_folder_remembers_and_its_videos_follow(memory, tmp_path):
    pipe = tiny.pipeline()
    pipe.variant = dataclasses.replace(pipe.variant, trained=Trained(memory))
    pipe.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "transformer" / "config.json").read_text())
    assert ("_trained" in written) == (memory != MemoryConfig())
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.variant.trained == Trained(memory)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plan_of(checkpoint.variant.trained).memory == memory


def test_the_windows_that_the_transformer_sees_are_those_of_the_training():
    videos = {}
    for name, memory in {
        "relative": dataclasses.replace(ABSOLUTE, positions="relative"),
        "absolute": ABSOLUTE,
        "none": ONE_SCALE,
    }.items():
        pipe = tiny.pipeline()
        pipe.variant = dataclasses.replace(pipe.variant, trained=Trained(memory))
        call = {"height": 32, "width": 48, "num_frames": 27, "num_inference_steps": 2, "guidance_scale": 1.0}
        videos[name] = pipe("a red plus", **call, output_type="latent").frames[0]
    first, later = videos["absolute"][:3], videos["absolute"][3:]
    np.testing.assert_allclose(first, videos["relative"][:3], atol=1e-5)  # the window of the first chunk is the same
    assert np.abs(later - videos["relative"][3:]).max() > 1e-3
    assert np.abs(videos["none"][3:] - videos["relative"][3:]).max() > 1e-3


def test_a_student_takes_the_steps_that_it_was_trained_for():
    trained = Trained(ABSOLUTE, steps=(1, 1, 2), amplify_first_chunk=True)

    def steps(**options):
        plan = plan_of(trained, STUDENT, **options)
        return [[len(level.steps.sigma) for level in levels] for levels in (plan.levels, plan.first_levels)]

    assert steps() == [[1, 1, 2], [2, 2, 4]]
    assert steps(pyramid_num_inference_steps_list=[2, 2, 2]) == [[2, 2, 2], [4, 4, 4]]
    assert steps(is_amplify_first_chunk=False) == [[1, 1, 2], [1, 1, 2]]
    released = plan_of(Trained(), STUDENT)
    assert [len(level.steps.sigma) for level in released.first_levels] == [2, 2, 2]


def test_a_student_is_sampled_at_the_times_of_its_training():
    """Timesteps at 384 x 640, from the equations: the shift counts a level's own tokens, and nothing is rounded."""
    scheduler = DMDSchedulerConfig(use_dynamic_shifting=True)
    options = SamplingOptions(pyramid_num_inference_steps_list=[2, 2, 2])

    def second_steps(trained: Trained) -> list[float]:
        variant = Variant(pyramid=True, is_distilled=True, trained=trained)
        plan = make_plan(TransformerConfig(), VAEConfig(), scheduler, variant, options)
        return [float(level.steps.timestep[1]) for level in plan.levels]

    assert second_steps(Trained()) == [833, 512, 174]  # of diffusers
    expected = []
    for level, tokens in zip(level_ranges(scheduler), (540, 2160, 8640)):
        high, low = level.timesteps
        mu, sigma = 0.5 + 0.65 * (tokens - 256) / 3840, (0.999 + 0.000999) / 2
        expected.append(low + (high - low) * mu * sigma / (1 + (mu - 1) * sigma))
    assert second_steps(Trained(training_times=True)) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(
    ("options", "expected", "told"),
    [
        ({"positions": "relative"}, {"positions": "relative"}, "positions relative: these weights were trained at pos"),
        ({"use_anchor": False}, {"anchor": None}, "anchor None: these weights were trained at anchor first"),
        ({"is_skip_first_chunk": True}, {"anchor": "second"}, None),
        ({"history_sizes": (0, 0, 3)}, {"long": 0, "mid": 0, "recent": 3}, "long 0, mid 0, recent 3: these weights"),
        ({"history_sizes": (16, 2, 1)}, {}, None),
        ({"num_latent_frames_per_chunk": 2}, {"frames_per_chunk": 2}, "frames_per_chunk 2: these weights"),
    ],
)  # fmt: skip
def test_an_option_overrides_the_training_and_says_so(options, expected, told):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        memory = plan_of(Trained(ABSOLUTE), **options).memory
    assert memory == dataclasses.replace(ABSOLUTE, **expected)
    assert [str(one.message) for one in caught if told is None or told not in str(one.message)] == []
    assert len(caught) == (told is not None)


@pytest.mark.parametrize("scale", [None, 5.0])
@pytest.mark.parametrize("of_checkpoint", [False, True])
def test_cfg_zero_star_is_the_checkpoint_s_unless_an_option_says_otherwise(of_checkpoint, scale):
    variant = Variant(pyramid=True, is_cfg_zero_star=of_checkpoint, trained_size=(64, 64))
    assert plan_of(Trained(), variant, guidance_scale=scale).zero_star is of_checkpoint
    assert plan_of(Trained(), variant, guidance_scale=scale, use_cfg_zero_star=True).zero_star
    assert not plan_of(Trained(), variant, guidance_scale=scale, use_cfg_zero_star=False).zero_star


@pytest.mark.parametrize(
    ("trained", "variant", "options", "message"),
    [
        (Trained(ONE_SCALE), None, {"is_skip_first_chunk": True}, "is_skip_first_chunk is about the anchor"),
        (Trained(), STUDENT, {"use_cfg_zero_star": True}, "use_cfg_zero_star changes guidance, which is off"),
        (Trained(), None, {"history_sizes": (1, 2, 0)}, "recent"),
        (Trained(), None, {"zero_steps": 2}, "zero_steps is 2, and this video has no such steps"),
        (Trained(), None, {"zero_steps": 2, "use_cfg_zero_star": True, "use_zero_init": False}, "zero_steps is 2"),
    ],
)
def test_options_that_contradict_are_refused(trained, variant, options, message):
    with pytest.raises(ValueError, match=message):
        plan_of(trained, variant, **options)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([1], "_trained: must hold `key: value` pairs"),
        ({"memory": {"positions": "odd"}}, "memory.positions"),
        ({"memory": {"recent": 0}}, "recent"),
        (
            {"steps": [1, 1, 1]},
            r"was trained as Distilled, but .*model_index.json says Base: give it to a Distilled model",
        ),
        ({"kind": "mid"}, r"was trained as Mid \(pyramid\), but"),
        ({"kind": "odd"}, "kind"),
        ({"kind": "mid", "steps": [1, 1]}, "kind must be distilled where there are steps, got mid"),
        ({"levels": {"gamma": 0.2}}, "levels.stage_range: has no default"),
        ({"stepz": 1}, "stepz"),
    ],
)
def test_a_record_that_cannot_be_is_one_line(changeable, record, message):
    path = changeable / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_trained": record}))
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(changeable)
    assert "\n" not in str(caught.value)


def test_a_lora_brings_the_settings_of_its_training(folder):
    checkpoint = Checkpoint.open(folder)
    records = {"a": Trained(ABSOLUTE).metadata(), "b": {}, "c": Trained(ONE_SCALE).metadata()}
    student = {METADATA: Trained(ABSOLUTE, (1, 1, 1)).metadata()[METADATA]}
    assert checkpoint.with_loras({name: records[name] for name in "ab"}).variant.trained == Trained(ABSOLUTE)
    assert checkpoint.with_loras({"b": {}}).variant == checkpoint.variant
    with pytest.raises(
        CheckpointError, match=r"a and c were trained with different settings .*memory.anchor first and N"
    ):
        checkpoint.with_loras(records)
    with pytest.raises(
        CheckpointError, match=r"s was trained for Distilled, and this checkpoint is Base: give it to a Distilled one"
    ):
        checkpoint.with_loras({"s": student})


def pyramid(path, *, distilled: bool = False) -> Checkpoint:
    """A tiny Mid or Distilled of three levels, whose record is empty, saved in `path`."""
    pipe = tiny.pipeline()
    pipe.scheduler = DMDSchedulerConfig() if distilled else SchedulerConfig()
    pipe.variant = dataclasses.replace(STUDENT, is_distilled=distilled)
    pipe.save_pretrained(path)
    return Checkpoint.open(path)


@pytest.mark.parametrize(
    ("distilled", "record", "rule"),
    [
        (False, Trained(kind="mid", levels=THIRDS), None),
        (False, Trained(ABSOLUTE), None),  # of an older run: kind and levels are unknown
        (False, Trained(kind="base"), r"trained as Base, but .*says Mid \(pyramid\): give it to a Base model"),
        (False, Trained(steps=(1, 1, 1)), r"trained as Distilled, but .*says Mid \(pyramid\): give it to a Distilled"),
        (False, Trained(kind="mid", levels=HALVES), r"with stage_range \[0.0, 0.5, 1.0\] .* a model of its levels"),
        (
            False,
            Trained(kind="mid", levels=Levels(THIRDS.stage_range, 0.2)),
            r"and gamma 0.2, but .*gamma 0.33333: give",
        ),
        (True, Trained(steps=(1, 1, 1), levels=THIRDS), None),
        (True, Trained(kind="mid", levels=THIRDS), r"trained as Mid \(pyramid\), but .* says Distilled"),
        (
            True,
            Trained(steps=(1, 1)),
            r"trained for \[1, 1\] steps, but .*scheduler has 3 stages: give it to a model of",
        ),
    ],
)
def test_a_transformer_belongs_to_a_model_of_its_kind_and_levels(tmp_path, distilled, record, rule):
    pyramid(tmp_path / "model", distilled=distilled)
    path = tmp_path / "model" / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | record.entries()))
    if rule is None:
        assert Checkpoint.open(tmp_path / "model").variant.trained == record
        return
    with pytest.raises(CheckpointError, match=rule) as caught:
        Checkpoint.open(tmp_path / "model")
    assert "\n" not in str(caught.value)


def test_a_lora_belongs_to_a_model_of_its_kind_and_levels(folder, tmp_path):
    mid = Trained(kind="mid", levels=THIRDS).metadata()
    two = Trained(kind="mid", levels=HALVES).metadata()
    old = Trained(ABSOLUTE).metadata()
    checkpoint = pyramid(tmp_path)
    assert checkpoint.with_loras({"style": {}, "a": mid}).variant.trained == Trained(kind="mid", levels=THIRDS)
    assert checkpoint.with_loras({"old": old}).variant.trained == Trained(ABSOLUTE)
    with pytest.raises(
        CheckpointError, match=r"^b: trained with stage_range \[0.0, 0.5, 1.0\] .*scheduler has stage_ran"
    ):
        checkpoint.with_loras({"style": {}, "b": two})
    with pytest.raises(
        CheckpointError, match=r"a and b were trained with different settings \(levels.stage_range \(0.0"
    ):
        checkpoint.with_loras({"a": mid, "b": two})
    with pytest.raises(CheckpointError, match=r"a was trained for Mid \(pyramid\), and this checkpoint is Base: give"):
        Checkpoint.open(folder).with_loras({"a": mid})


def test_loras_make_a_transformer_of_their_kind():
    mid, student = Trained(kind="mid", levels=THIRDS), Trained(steps=(1, 1, 1), levels=THIRDS)
    base, unknown = Trained(kind="base"), Trained()

    def made(trained, *loras, kind=None):
        return with_loras(trained, {str(i): lora.metadata() for i, lora in enumerate(loras)}, kind=kind)

    assert made(base, mid) == mid
    assert made(base, mid, student) == made(unknown, mid, student) == student
    assert made(mid, base) == mid
    assert made(student, mid, kind="distilled") == student
    assert made(unknown, mid) == Trained(levels=THIRDS)  # unknown weights may be a student's
    assert made(unknown, mid, kind="mid") == mid
    assert made(Trained(kind="mid", levels=HALVES), mid) == mid  # which the run adapted


@pytest.mark.parametrize("name", ["toy", "toy_mid", "toy_distilled"])
def test_the_embedded_models_record_their_kind(name):
    variant = Checkpoint.open(f"helios_jax/assets/{name}").variant
    assert variant.trained.kind == variant.kind
    assert variant.trained.levels == (None if name == "toy" else THIRDS)


def test_a_lora_of_an_earlier_stage_leaves_a_student_s_steps():
    student, earlier = Trained(ABSOLUTE, (1, 1, 1), True), Trained(ABSOLUTE).metadata()
    assert with_loras(student, {"a": earlier}, kind="distilled") == student
    assert with_loras(Trained(), {"a": earlier, "b": student.metadata()}, kind="distilled") == student
    other = {"a": earlier, "b": student.metadata(), "c": Trained(ABSOLUTE, (2, 2, 2)).metadata()}
    with pytest.raises(CheckpointError, match=r"b and c were trained with different settings \(steps \(1, 1, 1\)"):
        with_loras(student, other, kind="distilled")


@pytest.mark.reference
def test_diffusers_loads_a_folder_with_a_record(tmp_path):
    from diffusers import HeliosTransformer3DModel

    pipe = tiny.pipeline()
    record = Trained(ONE_SCALE, (1, 1, 1), levels=THIRDS)
    pipe.variant = dataclasses.replace(pipe.variant, trained=record)
    pipe.save_pretrained(tmp_path)
    released = tiny.pipeline()
    released.save_pretrained(tmp_path / "released")
    theirs, plain = (
        HeliosTransformer3DModel.from_config(HeliosTransformer3DModel.load_config(path / "transformer"))
        for path in (tmp_path, tmp_path / "released")
    )
    assert theirs.config.num_layers == tiny.TRANSFORMER.num_layers
    assert {k: v for k, v in theirs.config.items() if k != "_trained"} == dict(plain.config)


@pytest.mark.parametrize("pyramid", [False, True])
def test_the_first_steps_of_cfg_zero_star_have_no_velocity_with_a_pyramid_or_without(pyramid):
    variant = Variant(pyramid=pyramid, trained_size=(64, 64))
    counts = {"pyramid_num_inference_steps_list": [4, 4, 4]} if pyramid else {"num_inference_steps": 4}

    def moves(**options):
        first, *later = plan_of(Trained(), variant, **counts, **options).levels
        assert all(level.moves is None for level in later)
        return None if first.moves is None else first.moves.tolist()

    assert moves(use_cfg_zero_star=True) == [0, 0, 1, 1]
    assert moves(use_cfg_zero_star=True, zero_steps=0) == [0, 1, 1, 1]
    assert moves(use_cfg_zero_star=True, use_zero_init=False) is None
    assert moves(use_cfg_zero_star=False) is None
