"""Records that do not fit a run, and damaged ones: one line, before anything is built or where they are read."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from helios_jax.data import records
from helios_jax.data.records import EMPTY_TEXT, NEGATIVE_TEXT, PLAN
from helios_jax.training import cli, trainer
from tests.training import recipe


def write(folder: Path, features: dict, *examples: dict) -> Path:
    """A dataset of `examples`; `features` are values whose shapes may vary, or arrays that give the shape."""
    records.write(folder, features, {"train": examples})
    return folder


def clip(i=0, chunks=3, frames=9, side=8, channels=4, text=recipe.TEXT, **more):
    latents = np.full((chunks, frames, side, side, channels), i, np.float16)
    return {"latents": latents, "text": np.zeros(text, np.float16), "id": f"clip {i}", **more}


def features(example: dict) -> dict:
    return {
        key: records.text() if isinstance(x, str) else records.tensor([None] * np.ndim(x), np.asarray(x).dtype)
        for key, x in example.items()
    }


def pair(side=8, frames=9, history=19, channels=4, text=recipe.TEXT, times=2, **more):
    made = {"history": np.zeros((history, side, side, channels), np.float16), "text": np.zeros(text, np.float16)}
    made |= {"anchor": np.zeros((1, side, side, channels), np.float16), "chunk": np.int32(1), "id": "pair"}
    for level, size in enumerate((side // 2, side)):
        made |= {f"latents_{level}": np.zeros((3, frames, size, size, channels), np.float16)}
        made |= {f"{name}_{level}": np.ones(times, np.float32) for name in ("timesteps", "sigmas")}
    return made | more


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    recipe.build(folder)
    return folder


@pytest.fixture(autouse=True)
def nothing_is_built(monkeypatch):
    def build(*args, **kwargs):
        raise AssertionError("the model was built")

    monkeypatch.setattr(trainer, "init_sharded", build)


def refused(stage, root, folder, capsys, *more):
    """The one line that a run of `stage` on `folder` ends with."""
    run = root / "none"
    assert cli.main(recipe.arguments(stage, root, run, f"data.folder={folder}", *more)) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1, err
    assert not out
    assert not run.exists()
    return err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 6}, "has latents of 6 channels, the run takes 4 (in_channels of the transformer)"),
        ({"text": (5, 24)}, "has text of 24 features, the run takes 16 (text_dim of the transformer)"),
        ({"frames": 5}, "has latents of 5 frames a chunk, the run takes 9 (flow.memory.frames_per_chunk)"),
        ({"side": 7}, "latents 7 high, not a multiple of 2"),
        ({"latents": np.zeros((9, 8, 8, 4), np.float16)}, "latents must be [1, 9, rows, columns, 4], got [9, 8, 8, 4]"),
        ({"latents": np.zeros((3, 9, 8, 8, 4), np.uint8)}, "latents must be floating numbers, got uint8"),
    ],
    ids=["channels", "text", "frames", "side", "dimensions", "dtype"],
)
def test_latents_that_do_not_fit_are_refused(root, tmp_path, capsys, change, message):
    example = clip(**change) if "latents" not in change else {**clip(), **change}
    folder = write(tmp_path / "d", features(example), example)
    assert message in refused("stage1_post", root, folder, capsys)


def test_records_of_another_kind_are_refused(root, tmp_path, capsys):
    video = {"video": np.zeros((33, 16, 16, 3), np.uint8), "caption": "a", "id": "b"}
    pixels = write(tmp_path / "pixels", features(video), video)
    assert "has records of caption, id, video, without latents, text" in refused("stage1_post", root, pixels, capsys)
    assert "holds no ODE pairs" in refused("stage3_ode", root, root / "latents", capsys)
    assert "without latents" in refused("stage1_post", root, root / "ode", capsys)
    (tmp_path / "empty").mkdir()
    assert "empty is not a complete dataset" in refused("stage1_post", root, tmp_path / "empty", capsys)
    assert "folder must name the folder" in refused("stage1_post", root, "''", capsys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 6}, "has history of 6 channels, the run takes 4 (in_channels of the transformer)"),
        ({"history": 17}, "has history of 17 frames, the run takes 19 (flow.memory)"),
        ({"frames": 5}, "has latents_0 of 5 frames a chunk, the run takes 9"),
        ({"text": (5, 24)}, "has text of 24 features, the run takes 16"),
        ({"side": 6}, "latents 6 high, not a multiple of 4"),
        ({"times": 3}, "has timesteps_0 of 3 steps, the run takes 2 (one fewer than latents_0 has)"),
        ({"anchor": np.zeros((1, 4, 8, 4), np.float16)}, "has anchor of 4 rows, the run takes 8 (as the history has)"),
        ({"latents_0": np.zeros((3, 9, 8, 8, 4), np.float16)}, "has latents_0 of 8 rows, the run takes 4"),
    ],
    ids=["channels", "history", "frames", "text", "side", "times", "anchor", "level"],
)
def test_ode_pairs_that_do_not_fit_are_refused(root, tmp_path, capsys, change, message):
    arrays = {key: x for key, x in change.items() if isinstance(x, np.ndarray)}
    example = pair(**{key: x for key, x in change.items() if key not in arrays}) | arrays
    folder = write(tmp_path / "d", features(example), example)
    assert message in refused("stage3_ode", root, folder, capsys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "the model was built"),
        ({"student_steps": [2, 2]}, "holds pairs for distill.steps [2, 2], this run has [1, 1]; set distill.steps, or"),
        ({"amplify_first_chunk": False}, "holds pairs for distill.amplify_first_chunk False, this run has True"),
        ({"time_shift_type": None}, "holds pairs for distill.shift None, this run has linear"),
        (
            {"memory": {"positions": "absolute"}},
            "flow.memory.positions absolute, this run has relative",
        ),
        (
            {"levels": {"stage_range": [0, 0.6, 1]}},
            "stage_range [0, 0.6, 1], this run has [0.0, 0.5, 1.0]",
        ),
    ],
    ids=lambda x: next(iter(x), "same") if isinstance(x, dict) else "",
)
def test_ode_pairs_for_another_student_are_refused(root, tmp_path, capsys, change, message):
    folder = write(tmp_path / "d", features(pair()), pair())
    settings = {"student_steps": [1, 1], "amplify_first_chunk": True, "time_shift_type": "linear"}
    made = {"memory": {}, "levels": {}, "settings": settings}
    for name, value in change.items():
        (made if name in made else settings)[name] = value
    (folder / PLAN).write_text(json.dumps(made))
    if not change:
        with pytest.raises(AssertionError, match=message):
            refused("stage3_ode", root, folder, capsys)
        return
    assert message in refused("stage3_ode", root, folder, capsys)


def test_too_few_chunks_for_a_rollout_are_refused(root, capsys):
    told = refused("stage3_post", root, root / "latents", capsys, "distill.rollout.largest=4")
    assert "has latents of 3 chunks, the run takes 4 or more (distill.rollout.largest)" in told


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: np.save(path, np.zeros((5, 24), np.float16)), "is [5, 24], the records' text [5, 16]"),
    ],
    ids=["missing", "empty", "shape"],
)
def test_embeddings_beside_the_records_are_checked(root, tmp_path, capsys, damage, message):
    for name, stage in ((EMPTY_TEXT, "stage1_post"), (NEGATIVE_TEXT, "stage3_post")):
        folder = tmp_path / stage
        shutil.copytree(root / "latents", folder)
        damage(folder / name)
        told = refused(stage, root, folder, capsys)
        assert name in told
        assert message in told


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data.frames": 37}, "has video of 33 frames, the run takes 37 or more (data.frames)"),
        ({"data.crop": 24}, "has video of 16 pixel rows, the run takes 24 or more (data.crop)"),
        ({"data.crop": None, "size": 12}, "has videos of 12x12 pixels, not multiples of 8"),
        ({"split": "valid"}, "has no split 'test'"),
    ],
    ids=["frames", "crop", "multiple", "test"],
)
def test_videos_that_do_not_fit_are_refused(tmp_path, capsys, change, message):
    size = change.get("size", 16)
    video = {"video": np.zeros((33, size, size, 3), np.uint8), "id": "a"}
    records.write(tmp_path / "d", features(video), {"train": [video], change.get("split", "test"): [video]})
    data = {"folder": str(tmp_path / "d"), "batch_size": 1, "frames": 5, "crop": 8}
    data |= {key.removeprefix("data."): x for key, x in change.items() if key.startswith("data.")}
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"base": str(recipe.ROOT / "configs/toy/base.yaml"), "stage": "vae", "data": data}))
    assert cli.main([str(path), f"run={tmp_path / 'r'}"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert message in err
