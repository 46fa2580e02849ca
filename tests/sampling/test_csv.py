"""Many videos of a CSV: all that can be made are, and the same command goes on."""

import json

import pytest
from PIL import Image

from helios_jax.media.video import read_video
from tests.tiny_run import run

CSV = """id,prompt,image,seed
7,a red plus,,3
8,a blue bar,missing.png,
x9,"a bar, green",,
"""


def test_a_csv_makes_all_it_can_and_goes_on(config, tmp_path, capsys):
    (tmp_path / "p.csv").write_text(CSV)
    arguments = [
        "--csv",
        tmp_path / "p.csv",
        "--num-frames",
        9,
        "--out",
        tmp_path / "all",
        "--num-videos-per-prompt",
        2,
    ]
    assert run(config, *arguments) == 1
    printed = capsys.readouterr()
    names = {path.name for path in (tmp_path / "all").glob("*.mp4")}
    assert names == {"7_seed3.mp4", "7_seed4.mp4", "x9_seed0.mp4", "x9_seed1.mp4"}
    assert f"2 of 6 videos have no input yet, the first id 8, seed 0: {tmp_path / 'missing.png'}\n" in printed.err
    assert "2 of 6 videos failed" in printed.err
    Image.new("RGB", (48, 32)).save(tmp_path / "missing.png")
    before = (tmp_path / "all" / "7_seed3.mp4").stat().st_mtime_ns
    assert run(config, *arguments) == 0
    assert "6 videos, 4 of them done before" in capsys.readouterr().out
    assert (tmp_path / "all" / "7_seed3.mp4").stat().st_mtime_ns == before
    assert run(config, *arguments) == 0  # all done: no weights are read
    assert run(config, *arguments, "--guidance-scale", 2) == 2
    assert "other settings (guidance_scale)" in capsys.readouterr().err


def test_interactive_csv_and_benchmark_names(config, tmp_path):
    (tmp_path / "p.csv").write_text("id,prompt_index,prompt\n6,1,a blue bar\n6,0,a red plus\n12,0,a bar\n12,1,a plus\n")
    arguments = ["--csv", tmp_path / "p.csv", "--out", tmp_path / "all", "ids=[6]", "interpolate_time=1"]
    assert run(config, *arguments, "--naming", "heliosbench", "interpolation_steps=0", "num_frames=9") == 0
    (path,) = (tmp_path / "all").glob("*.mp4")
    assert path.name == "6_18_ori18.mp4"
    assert len(read_video(path)[0]) == 18
    facts = json.loads((tmp_path / "all" / "6_18_ori18.json").read_text())
    assert facts["settings"]["prompt"] == "a red plus"
    assert [s["prompt"] for s in facts["settings"]["switches"]] == ["a blue bar"]


@pytest.mark.parametrize(
    ("text", "arguments", "words"),
    [
        ("prompt\na\n", ["--out", "x.mp4"], ["out", "folder"]),
        ("text\na\n", [], ["'text'"]),
        ("id,seed\n1,2\n", [], ["no column prompt"]),
        ("id,promt\n1,2\n", [], ["'promt'", "prompt"]),
        ("id,prompt\n1,a\n1,b\n", [], ["id 1", "line 3", "line 2"]),
        ("id,prompt\n../x,a\n", [], ["'../x'"]),
        ("id,prompt,seed\n1,a,many\n", [], ["line 2", "seed", "'many'"]),
        ("id,prompt\n1,\n", [], ["id 1", "prompt"]),
        ("id,prompt\n1,a\n", ["ids=[2]"], ["no id 2"]),
        ("id,prompt\n", [], ["no row"]),
        ("prompt,num_frames,duration\na,9,18\n", [], ["line 2", "num_frames 9", "duration 18", "differ"]),
        ("id,prompt_index,prompt,seed\n6,0,a,1\n6,1,b,2\n", [], ["line 3", "seed", "first prompt"]),
        ("id,prompt_index,prompt\n6,0,a\n6,1,b\n", ["--then", "1", "c"], ["id 6", "--then", "several rows"]),
        ("id,prompt_index,prompt,num_frames\n6,0,a,33\n6,1,b,\n", [], ["id 6", "past the end", "num_frames 33"]),
        ("id,prompt\na,x\n", ["--naming", "heliosbench"], ["naming", "whole numbers", "id a"]),
        ("id,prompt\n1,a\n", ["--prompt", "b"], ["--prompt has no effect", "the csv has the prompts"]),
        ("prompt\na\n", ["--interpolation-steps", "2"], ["--interpolation-steps has no effect", "takes over"]),
        ("prompt\na\n", ["interpolate_time=2"], ["interpolate_time has no effect", "no column prompt_index"]),
        (None, [], ["is no file"]),
    ],
)
def test_a_bad_csv_is_one_line(config, tmp_path, capsys, text, arguments, words):
    if text is not None:
        (tmp_path / "p.csv").write_text(text)
    out = [] if "--out" in arguments else ["--out", tmp_path / "all"]
    assert run(config, "--csv", tmp_path / "p.csv", *out, *arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(word in error for word in words), error
    assert not (tmp_path / "all").exists()
