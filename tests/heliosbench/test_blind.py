"""Blind comparisons: pairs, win rates, and the page as a browser runs it."""

import base64
import csv
import io
import json
import re
import shutil
import subprocess
from collections import Counter

import numpy as np
import pytest

from helios_jax.heliosbench import blind
from helios_jax.heliosbench.bench_videos import BenchVideo
from helios_jax.heliosbench.blind_pairs import WinRate, draw_pairs, win_rates
from helios_jax.media.mp4 import VideoWriter

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def folders(tmp_path):
    """Three models with three videos each, of which the last has one of its own; and prompts."""
    for model, ids in (("ours", (1, 2, 3)), ("theirs", (1, 2, 3)), ("third", (2, 3, 4))):
        (tmp_path / model).mkdir()
        for number in ids:
            with VideoWriter(tmp_path / model / f"{number}_9_ori9.mp4", 24, 16, 32) as video:
                video.write(np.full((9, 16, 32, 3), 40 * number, np.uint8))
    prompts = "".join(f'{i},"prompt <{i}>, </script>",9\n' for i in range(1, 5))
    (tmp_path / "prompts.csv").write_text(f"id,prompt,duration\n{prompts}")
    return tmp_path


def run(folder, *models: str, out="page", more=()) -> int:
    videos = [str(folder / model) for model in models]
    return blind.main([*videos, "--prompts", str(folder / "prompts.csv"), "--out", str(folder / out), *more])


def page_data(folder, out="page") -> tuple[dict, list[dict]]:
    text = (folder / out / "index.html").read_text()
    data = json.loads(re.search(r"const DATA = (.*);\n", text)[1])
    return data, json.loads(base64.b64decode(data["key"]))


def test_pairs_are_of_shared_prompts_on_random_sides(tmp_path):
    models = {name: [BenchVideo(tmp_path / f"{name}{i}", i, "") for i in range(200)] for name in "abc"}
    pairs = draw_pairs(models, None, 0)
    assert len(pairs) == 600
    assert all(pair.left.id == pair.right.id for pair in pairs)
    sides = Counter((pair.left_model, pair.right_model) for pair in pairs)
    assert len(sides) == 6
    assert min(sides.values()) > 70
    assert draw_pairs(models, None, 0) == pairs != draw_pairs(models, None, 1)
    few = draw_pairs(models, 30, 0)
    assert set(Counter(frozenset((p.left_model, p.right_model)) for p in few).values()) == {10}


def test_win_rates():
    rows = [{"left": "a", "right": "b", "choice": choice} for choice in ("left", "left", "tie", "right")]
    a, b = win_rates(rows)
    assert a == WinRate("a", 4, 2, 1, 1)
    assert (a.rate, b.rate) == (0.625, 0.375)
    # Wilson's interval of 8 of 10, from a table
    assert WinRate("x", 10, 8, 0, 2).interval == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert WinRate("x", 5, 5, 0, 0).interval == pytest.approx((0.5655, 1.0), abs=1e-4)


def test_a_page_hides_the_models(folders, capsys):
    assert run(folders, "ours", "theirs", "third") == 0
    assert "7 pairs: open" in capsys.readouterr().out
    data, key = page_data(folders)
    text = (folders / "page" / "index.html").read_text()
    assert not re.search("ours|theirs|third", text)
    assert {name for one in key for name in one.values()} == {"ours", "theirs", "third"}
    for pair, names in zip(data["pairs"], key):
        assert pair["prompt"] == f"prompt <{pair['id']}>, </script>"
        for side in ("left", "right"):
            original = folders / names[side] / f"{pair['id']}_9_ori9.mp4"
            assert (folders / "page" / pair[side]).read_bytes() == original.read_bytes()
    assert text.count("</script>") == 1


KEYS = """
<script>
localStorage.clear(); choices = []; show();
const press = key => document.dispatchEvent(new KeyboardEvent("keydown", {key}));
const first = document.querySelector("#left video");
first.addEventListener("loadeddata", () => {
  document.body.dataset.size = first.videoWidth + "x" + first.videoHeight;
  document.body.dataset.prompt = document.getElementById("prompt").textContent;
  for (const key of ["ArrowLeft", "Backspace", ...KEYS]) press(key);
  document.getElementById("rater").value = 'a "b", c';
  document.body.dataset.csv = judgments();
  document.body.dataset.rates = csv(rates());
  document.body.dataset.stored = localStorage.getItem(STORE).length;
}, {once: true});
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_page_in_a_browser(folders, capsys):
    """Keys choose and undo; what the page saves is what the command reads, with the same win rates."""
    run(folders, "ours", "theirs", "third")
    data, key = page_data(folders)
    pressed = ["ArrowLeft", "ArrowRight", " ", "ArrowLeft", "x", "ArrowLeft", "ArrowRight", "ArrowRight", "ArrowLeft"]
    made = ["left", "right", "tie", "left", "left", "right", "right"]  # the last key comes after the last pair
    page = folders / "page" / "index.html"
    page.write_text(page.read_text() + KEYS.replace("KEYS", json.dumps(pressed), 1))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--autoplay-policy=no-user-gesture-required"]
    flags += ["--virtual-time-budget=20000", f"--user-data-dir={folders}/profile", "--dump-dom"]
    shown = subprocess.run(
        [CHROMIUM, *flags, page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip
    body = re.search(r"<body([^>]*)>", shown)[1]
    found = {name: html_text(value) for name, value in re.findall(r'data-(\w+)="([^"]*)"', body)}
    assert found["size"] == "32x16"
    assert found["prompt"] == data["pairs"][0]["prompt"]
    rows = list(csv.DictReader(io.StringIO(found["csv"])))
    assert [row["choice"] for row in rows] == made
    assert [(row["left"], row["right"]) for row in rows] == [(one["left"], one["right"]) for one in key]
    assert {row["rater"] for row in rows} == {'a "b", c'}
    assert int(found["stored"]) > 100
    assert '<section id="results">' in shown
    assert f"<td>{sum(one['left'] == 'ours' or one['right'] == 'ours' for one in key)}</td>" in shown

    (folders / "judgments.csv").write_text(found["csv"])
    assert blind.main(["--results", str(folders / "judgments.csv"), "--out", str(folders / "results")]) == 0
    assert (folders / "results" / "win_rates.csv").read_text() == found["rates"]
    assert re.search(r"ours: [\d.]+% of \d \(", capsys.readouterr().out)


def html_text(text: str) -> str:
    import html

    return html.unescape(text)


def test_results_of_several_people(folders, capsys):
    head = "rater,pair,id,left,right,choice,seconds\n"
    for name, choice in (("anna", "left"), ("ben", "tie")):
        (folders / f"{name}.csv").write_text(f"{head}{name},1,2,ours,theirs,{choice},3.5\n")
    files = [str(folders / f"{name}.csv") for name in ("anna", "ben")]
    assert blind.main(["--results", *files, "--out", str(folders / "results")]) == 0
    rows = (folders / "results" / "win_rates.csv").read_text().splitlines()
    assert rows[0] == "model,comparisons,wins,ties,losses,win_rate,low,high"
    assert rows[1].startswith("ours,2,1,1,0,0.7500,")
    (folders / "ben.csv").write_text("a,b\n1,2\n")
    assert blind.main(["--results", *files, "--out", str(folders / "results")]) == 2
    assert "is no file of judgments" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("models", "more", "reason"),
    [
        (["ours"], [], "two folders of videos or more"),
        (["ours", "ours"], [], "two folders are named ours"),
        (["ours", "theirs"], ["--pairs", "0"], "--pairs: must be a number from 1 up"),
        (["ours", "none"], [], "is no folder"),
    ],
)
def test_input_that_cannot_be_used(folders, capsys, models, more, reason):
    assert run(folders, *models, more=more) == 2
    assert reason in capsys.readouterr().err


def test_a_folder_in_use_and_models_without_a_shared_prompt(folders, capsys):
    assert run(folders, "ours", "theirs", out="ours") == 2
    assert "is not empty" in capsys.readouterr().err
    for number in (2, 3):
        (folders / "third" / f"{number}_9_ori9.mp4").unlink()
    assert run(folders, "ours", "third") == 2
    assert "share no prompt" in capsys.readouterr().err
