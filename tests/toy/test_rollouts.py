"""The scorer of the toy's ablations: a file of scores as the tables read it, from videos of one or the other kind."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helios_jax.ablations import scores
from helios_jax.ablations.table import Jobs, read
from helios_jax.toy import gallery, report, rollouts
from helios_jax.toy.overrides import check_overrides
from tests.processes import ROOT

MODEL = "helios_jax/assets/toy"


@pytest.mark.parametrize("wordless", [False, True])
def test_scores_of_the_embedded_model(wordless, tmp_path):
    arguments = ["--model", MODEL, "--out", str(tmp_path), "--videos", "2", "--chunks", "2", "--borders"]
    arguments += ["num_inference_steps=1", "overlap_chunks=true"]
    assert rollouts.main(arguments + ["--wordless"] * wordless) == 0
    found = scores.read(tmp_path)
    assert len(set(found.ids)) == 2
    assert all(np.isfinite(values).all() for values in found.metrics.values())
    assert found.seconds["shape"].shape == (2, 4)  # of 66 frames
    # One step makes no shape. A rendered chunk comes first where no words say what to show.
    first, last = found.seconds["shape"][:, 0].mean(), found.seconds["shape"][:, -1].mean()
    assert last <= 0.5
    assert (first > 0.99) == wordless
    assert ("position_error" in found.metrics) == wordless
    assert (found.metrics["latent_border_ratio"] == 1).all() == wordless  # of one sampled chunk
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size[0] > 64


def test_the_embedded_student_shows_in_three_steps_what_is_asked_for(tmp_path):
    arguments = ["--model", f"{MODEL}_distilled", "--out", str(tmp_path), "--videos", "4", "--chunks", "2"]
    assert rollouts.main([*arguments, "num_inference_steps=null", "guidance_scale=null"]) == 0
    found = {name: values.mean() for name, values in scores.read(tmp_path).metrics.items()}
    assert found["calls"] == 3
    assert min(found[name] for name in ("shape", "colour", "direction", "contrast")) > 0.9
    assert found["colour_error"] < 0.06
    assert 0.7 < found["latent_border_ratio"] < 2


def test_the_tables_give_only_options_that_are_taken(monkeypatch):
    monkeypatch.chdir(ROOT)
    for path in ROOT.glob("configs/ablations/*.yaml"):
        table = read(path)
        commands = [Jobs(table, Path("out"))(row, 0).command for row in table.rows]
        for words in commands:
            assert path.stem.endswith("_14b") or "helios_jax.toy.rollouts" in words
            if "helios_jax.toy.rollouts" in words:
                check_overrides([word for word in words if "=" in word], rollouts.FLAGS)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--videos", "0"], "--videos must be at least 1, got 0"),
        (["--wordless", "--chunks", "1"], "--chunks must be at least 2, got 1"),
        (["guidance=2"], "guidance"),
        (["--model", "nowhere"], "nowhere"),
        (["--seed", "-1"], "--seed must be from 0 to 2^64 - 1, got -1"),
        (["--seed", str(2**62)], "the last video's seed, 1000 times --seed, must be from 0 to 2^64 - 1"),
        (["loras=[/x]"], "override 'loras=[/x]': loras is no option that is taken here; leave it out, or give one of"),
        (["transformer=nope"], "transformer is no option that is taken here"),
        (["precision=bfloat16"], "precision is no option that is taken here"),
        (["image=/none.png"], "image is no option that is taken here"),
        (["negative_prompt=zzz"], "negative_prompt is no option that is taken here"),
        (["guidance_scal=2"], "guidance_scal is no option that is taken here; did you mean guidance_scale?"),
        (["seed=7"], "override 'seed=7': seed is set by a flag: give --seed"),
        (["num_frames=99"], "num_frames is set by a flag: give --chunks"),
        (["model=x"], "model is set by a flag: give --model"),
        (["--out", "gs://bucket/x"], "--out: gs://bucket/x is remote, and this must be local"),
        (["--out", "pyproject.toml"], "pyproject.toml: cannot be made (pyproject.toml is a file); name another folder"),
        (["--out", "/proc/x"], "/proc/x: cannot be made"),
    ],
)
def test_input_that_cannot_be_used_is_one_line(arguments, reason, tmp_path, capsys):
    assert rollouts.main(["--model", MODEL, "--out", str(tmp_path / "x"), *arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert reason in said
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("tool", [gallery, report])
@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("loras=[/x]", "loras is no option that is taken here"),
        ("model=x", "model is set by a flag: give --config"),
        ("seed=7", "seed is no option that is taken here"),
        ("guidance_scale=x", "guidance_scale"),
    ],
)
def test_reports_refuse_overrides_that_they_would_ignore(tool, override, reason, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        tool.main(["--out", str(tmp_path / "x.md"), override])
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert reason in said
