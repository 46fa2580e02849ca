"""ODE pairs: the times are upstream's, the latents are those of the teacher's sampling."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from helios_jax.data import records
from helios_jax.data.loader import loader, ode_transform
from helios_jax.diffusion.denoise import first_sample
from helios_jax.diffusion.levels import make_trajectory
from helios_jax.diffusion.memory import MemoryConfig
from helios_jax.diffusion.schedule import SchedulerConfig
from helios_jax.precompute import cli as precompute
from helios_jax.precompute.prompt_files import Prompt
from helios_jax.precompute.trajectories import Settings, Teacher
from helios_jax.sampling.checkpoint import Checkpoint
from helios_jax.sampling.plan import Variant
from helios_jax.trained import Trained
from tests import tiny

# get_ode-pairs.py: the first chunk's, and those of all others.
UPSTREAM = [
    [[998.5342, 902.2183, 833.9636, 783.0660], [742.8216, 640.0038, 547.1926, 462.9951],
     [385.4137, 328.6249, 253.9905, 151.5308]],
    [[998.5342, 833.9636], [742.8216, 547.1926], [385.4137, 253.9905]],
]  # fmt: skip
SMALL = Settings(
    height=64,
    width=64,
    num_frames=18,
    steps=(3, 3, 3),
    student_steps=(1, 1, 1),
    num_latent_frames_per_chunk=3,
    negative_prompt="a bar",
)
PROMPTS = [Prompt("p_0", "a red plus", 0), Prompt("p_1", "a blue bar", 1), Prompt("p_2", "a square", 2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Mid checkpoint."""
    pipe = tiny.pipeline()
    pipe.scheduler = SchedulerConfig()
    pipe.variant = Variant(pyramid=True, is_cfg_zero_star=True, trained_size=(64, 64))
    path = tmp_path_factory.mktemp("mid")
    pipe.save_pretrained(path)
    return path


def sample(folder, settings, prompts=PROMPTS[:1], batch=1):
    return list(Teacher(Checkpoint.open(folder), settings, batch=batch).load()(prompts))


@pytest.mark.parametrize("factor", [2, 1])
def test_times_are_upstream_s_and_steps_of_the_teacher(factor):
    config = SchedulerConfig(use_dynamic_shifting=True, time_shift_type="linear")
    way = make_trajectory(config, (20, 20, 20), [2 * factor] * 3, tokens=9 * 24 * 40)
    for i, level in enumerate(way.levels):
        np.testing.assert_allclose(way.timesteps[i], UPSTREAM[2 - factor][i], atol=2e-2)
        # Upstream adds the student's times to the teacher's 20; the first of a level is of both.
        assert len(level.steps.sigma) == 19 + 2 * factor
        places = list(way.places[i])
        np.testing.assert_array_equal(np.asarray(level.steps.timestep)[places], np.trunc(way.timesteps[i]))
        np.testing.assert_array_equal(np.asarray(level.steps.sigma)[places], way.sigmas[i])
        assert (np.diff(level.steps.sigma) < 0).all()


def test_without_the_student_s_times_it_is_the_pipeline_s_sampling(folder):
    # One student step is at a level's start, which is a step of the teacher's anyway.
    settings = dataclasses.replace(SMALL, amplify_first_chunk=False, time_shift_type=None, cfg_zero_star=True)
    (chunks,) = sample(folder, settings)
    pipe = tiny.pipeline()
    pipe.scheduler, pipe.variant = SchedulerConfig(), Variant(True, True, trained_size=(64, 64))
    options = {"height": 64, "width": 64, "num_frames": 18, "pyramid_num_inference_steps_list": [3, 3, 3]}
    video = pipe(
        "a red plus", "a bar", **options, guidance_scale=5.0, num_latent_frames_per_chunk=3, seed=42,
        output_type="latent",
    ).frames[0]  # fmt: skip
    ours = np.concatenate([chunk["latents_2"][-1] for chunk in chunks])
    np.testing.assert_allclose(ours, video, atol=5e-3)


def test_the_teacher_s_memory_is_that_of_its_training(folder, tmp_path):
    memory = MemoryConfig(long=0, mid=0, recent=4, anchor=None, frames_per_chunk=2, positions="absolute")
    shutil.copytree(folder, tmp_path / "mid")
    path = tmp_path / "mid" / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | Trained(memory).entries()))
    settings = dataclasses.replace(SMALL, num_latent_frames_per_chunk=None)
    teacher = Teacher(Checkpoint.open(tmp_path / "mid"), settings)
    assert teacher.plan.memory == memory
    assert teacher.facts()["memory"] == dataclasses.asdict(memory)


def test_a_record_holds_the_chunk_s_past_and_its_way(folder):
    chunks, other = sample(folder, SMALL, PROMPTS[:2])
    assert [chunk["id"] for chunk in chunks] == ["p_0_0", "p_0_1"]
    assert [int(chunk["chunk"]) for chunk in chunks] == [0, 1]
    for i, size in enumerate((2, 4, 8)):
        assert chunks[0][f"latents_{i}"].shape == (3, 3, size, size, 4)  # two steps in the first chunk, and the result
        assert chunks[1][f"latents_{i}"].shape == (2, 3, size, size, 4)
        assert chunks[0][f"timesteps_{i}"].shape == chunks[0][f"sigmas_{i}"].shape == (2,)
    assert not chunks[0]["history"].any()
    assert not chunks[0]["anchor"].any()
    result = chunks[0]["latents_2"][-1]
    np.testing.assert_array_equal(chunks[1]["history"][-3:], result)
    assert not chunks[1]["history"][:-3].any()
    np.testing.assert_array_equal(chunks[1]["anchor"], result[:1])
    assert np.abs(other[0]["latents_0"][0] - chunks[0]["latents_0"][0]).max() > 0.1  # noise of its own

    teacher = Teacher(Checkpoint.open(folder), SMALL).load()
    call = teacher._pipeline.prepare(["a red plus"], "a bar", teacher.plan, seed=[42])
    noise = first_sample(call.chunk_noise(), call.plan.levels)
    np.testing.assert_allclose(chunks[0]["latents_0"][0], noise[0], atol=2e-3)


def test_prompts_of_a_batch_do_not_mix(folder):
    alone = sample(folder, SMALL, PROMPTS)
    together = sample(folder, SMALL, PROMPTS, batch=2)
    for one, same in zip(alone, together):
        for chunk, other in zip(one, same):
            assert chunk["id"] == other["id"]
            for key in ("history", "latents_0", "latents_1", "latents_2", "text"):
                np.testing.assert_allclose(chunk[key], other[key], atol=2e-2, err_msg=key)


def test_the_command_makes_what_a_loader_reads(folder, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a red plus\na blue bar\n")
    command = ["ode", "--prompts", f"{tmp_path}/p.txt", "--model", str(folder), "--out", f"{tmp_path}/ode"]
    command += ["--size", "64x64", "--num-frames", "18", "--steps", "3", "3", "3", "--student-steps", "1", "1", "1"]
    command += ["--num-latent-frames-per-chunk", "3", "--negative-prompt", "a bar", "--shard-size", "1"]
    assert precompute.main(command) == 0
    assert "4 records" in capsys.readouterr().out
    source = records.open_source(tmp_path / "ode", "train")
    (alone,) = sample(folder, SMALL)
    for got, chunk in zip(source, alone):
        assert set(got) == set(chunk)
        assert str(got.pop("id")) == f"p_00000_{chunk['chunk']}"
        for key, value in got.items():
            np.testing.assert_array_equal(value, chunk[key])
    assert np.load(tmp_path / "ode" / records.NEGATIVE_TEXT).shape == (16, 16)

    seen = set()
    batches = loader(source, seed=0, batch_size=2, transform=ode_transform)
    for _, batch in zip(range(8), batches):
        assert [x.shape for x in batch["noisy"]] == [(2, 3, n, n, 4) for n in (2, 4, 8)]
        assert batch["history"].shape == (2, 19, 8, 8, 4)
        for b in range(2):
            record = next(x for x in source if x["id"] == batch["id"][b])
            for i in range(3):
                place = int(np.argmin(np.abs(record[f"timesteps_{i}"] - batch["timestep"][i][b])))
                seen.add((int(batch["chunk"][b]), i, place))
                np.testing.assert_array_equal(batch["noisy"][i][b], record[f"latents_{i}"][place])
                np.testing.assert_array_equal(batch["target"][i][b], record[f"latents_{i}"][-1])
                assert batch["sigma"][i][b] == record[f"sigmas_{i}"][place]
    assert {(chunk, place) for chunk, _, place in seen} == {(0, 0), (0, 1), (1, 0)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": (3, 0, 3)}, "--steps .*: every level needs at least 1"),
        ({"student_steps": (1, 1)}, "are 2 levels, the teacher's .* are 3"),
        ({"steps": (3, 3), "student_steps": (1, 1)}, "needs 3 numbers"),
        ({"height": 48}, "height must be a multiple of 64"),
    ],
)
def test_what_cannot_be_sampled_is_one_line_before_weights_are_read(folder, change, message):
    with pytest.raises(ValueError, match=message) as error:
        Teacher(Checkpoint.open(folder), dataclasses.replace(SMALL, **change))
    assert "\n" not in str(error.value)


def test_a_teacher_has_a_pyramid(tmp_path):
    tiny.folder(tmp_path)
    with pytest.raises(ValueError, match="is Base: the teacher of ODE pairs is a Mid checkpoint"):
        Teacher(Checkpoint.open(tmp_path), SMALL)
