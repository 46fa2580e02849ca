"""Input of a table's command that cannot be used: one line before any job runs, and a page with what is there after."""

import json
from pathlib import Path

import pytest

from helios_jax.ablations import command, scores
from helios_jax.ablations.table import read
from helios_jax.config import ConfigError

PROG = "python -m helios_jax.ablations"
TABLE = """
title: T
variables: {change: "1"}
steps:
  score: cp FOLDER/{change}.json {out}/scores.json
rows:
  full: {}
  other: {change: "2"}
claims:
  - {says: It drifts, metric: drift, row: full, against: [other]}
"""
SCORES = {"videos": [{"id": 0, "drift": 1}, {"id": 1, "drift": 1}], "seconds": {"drift": [[1], [2]]}}


@pytest.fixture
def table(tmp_path):
    for name, number in {"1": 1, "2": 3}.items():
        videos = [{"id": i, "drift": number} for i in range(2)]
        (tmp_path / f"{name}.json").write_text(json.dumps({**SCORES, "videos": videos}))
    path = tmp_path / "table.yaml"
    path.write_text(TABLE.replace("FOLDER", str(tmp_path)))
    return path


def run(table: Path, *arguments: object) -> int:
    return command.main([str(table), "--out", str(table.parent / "out"), *map(str, arguments)])


def refusal(capsys) -> str:
    """The one line that the command has printed."""
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err.removeprefix(f"{PROG}: ").rstrip("\n")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("score: cp FOLDER/{change}.json {out}/scores.json", 'score: ""', "steps: score is '': it must begin with a"),
        ("score: cp", "score: >-\n    '' cp", "it must begin with a program, such as python"),
        ("score: cp FOLDER", "score: cp 'FOLDER", "steps: score: no closing quotation: correct the quotes in"),
        ('change: "1"', 'change: "1", chnage: "2"', "variables: chnage is used by no step that a row needs: write"),
        ('change: "1"', 'change: "1", chnage: "2"', "write {chnage} into one, or leave it out; did you mean change?"),
        (
            '{change: "1"}\nsteps:',
            '{change: "1", level: "", model: "{train}"}\nsteps:\n  train: touch {out}/{level} {model} {change}',
            "variables: level is used by no step",
        ),
        ("title: T", "title: T\nseeds: [-1]", "seeds must be different numbers from 0 up"),
    ],
)
def test_tables_that_cannot_be_or_have_words_without_effect(table, old, new, message):
    text = table.read_text().replace(str(table.parent), "FOLDER")
    assert old in text
    table.write_text(text.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        read(table)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{table}: ")
    assert "\n" not in str(caught.value)


def test_a_row_that_sets_what_its_steps_do_not_use_is_refused(table):
    text = table.read_text().replace('change: "1"', 'change: "1", model: "{train}", level: "0"')
    text = text.replace("score: cp", "train: touch {out}/{level}\n  score: cp {model}/x")
    table.write_text(text.replace('change: "2"', 'model: "{out}", level: "2"'))
    with pytest.raises(ConfigError, match="rows: 'other' sets level, which no step of this row uses"):
        read(table)
    table.write_text(text.replace('change: "2"', 'level: "2"'))
    read(table)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parallel", "-1"], "argument --parallel: must be a number from 1 up, got -1; --help lists all flags"),
        (["--out", "gs://bucket/x"], "--out: gs://bucket/x is remote, and this must be local: name a local folder or"),
        (["--out", "s3://bucket/x"], "--out: s3://bucket/x is remote"),
        (["--page", "gs://bucket/x.md"], "--page: gs://bucket/x.md is remote"),
        (["--out", "FOLDER/file"], "FOLDER/file: cannot be made (FOLDER/file is a file); name another folder"),
        (["--page", "FOLDER"], "--page: FOLDER does not end in .md; name a Markdown file, such as"),
        (["--page", "FOLDER/p.csv"], "--page: FOLDER/p.csv does not end in .md"),
        (["--page", "FOLDER/folder.md"], "--page: FOLDER/folder.md is no regular file; name another page"),
        (["--page", "FOLDER/file/p.md"], "FOLDER/file/p.md: its folder cannot be made"),
        (["--page", "/proc/p.md"], "/proc/p.md: "),
        (["--page", "FOLDER/mine.md"], "--page: FOLDER/mine.json is there already, and was not written with a page"),
        (["--page", "FOLDER/notes.md"], "--page: FOLDER/notes.md is there already, and was not"),
        (["--page", "FOLDER/picture.md"], "--page: FOLDER/picture-full.png is there already, and was not"),
    ],
)
def test_places_that_cannot_be_used_are_refused_before_any_job_runs(table, arguments, message, capsys, monkeypatch):
    folder = table.parent
    monkeypatch.chdir(folder)
    (folder / "folder.md").mkdir()
    for name in ("file", "mine.json", "notes.md", "picture-full.png"):
        (folder / name).write_text("[1]")
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert run(table, *(text.replace("FOLDER", str(folder)) for text in arguments)) == 2
    assert message.replace("FOLDER", str(folder)) in refusal(capsys)
    assert before == {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert not [*folder.glob("**/scores.json")]
    assert not any((folder / name).exists() for name in ("gs:", "s3:"))


def test_a_page_may_be_written_again_and_home_is_known(table, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(table.parent))
    for _ in range(2):
        assert command.main([str(table), "--out", "~/there", "--page", "~/pages/p.md"]) == 0
    assert "Holds for one seed" in (table.parent / "pages/p.md").read_text()
    assert (table.parent / "there").is_dir()
    (table.parent / "pages/p.md").unlink()  # as if the first had been killed before its last file
    assert run(table, "--page", table.parent / "pages/p.md") == 0


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("drifts, metric: drift", "drifts, metric: drfit", "claims: drfit is no metric of full; it has drift"),
        ("title: T", "title: T\nshown: [drfit, drift]", "shown: drfit was not scored in any row; did you mean drift?"),
        ("title: T", "title: T\nshown: [x]", "shown: x was not scored in any row; there are drift"),
        (
            "title: T",
            "title: T\ncurves: [drfit, drift]",
            "curves: drfit was not scored in any row; did you mean drift?",
        ),
    ],
)
def test_metrics_that_are_not_there_are_told_and_the_page_has_the_others(table, old, new, message, capsys):
    text = table.read_text()
    table.write_text(text.replace("  - {says", "  - {says: Also, metric: drift, row: full, at_most: 2}\n  - {says"))
    table.write_text(table.read_text().replace(old, new))
    assert run(table) == 1
    assert refusal(capsys) == f"missing on the page: {message}"
    page = (table.parent / "out/page.md").read_text()
    assert f"- missing: {message}" in page
    assert "**Holds for one seed**: Also." in page
    assert "| full |" in page
    assert "drfit |" not in page


@pytest.mark.parametrize(
    ("scored", "message"),
    [
        ({**SCORES, "picture": "sheet.png"}, "picture of full: {}/sheet.png: No such file or directory"),
        ({"videos": SCORES["videos"]}, None),
        ({"videos": [{"id": 7, "drift": 1}]}, "claims: full and other have different videos: score both alike"),
    ],
)
def test_scores_that_do_not_fit_are_told_and_the_page_has_the_others(table, scored, message, capsys):
    (table.parent / "1.json").write_text(json.dumps(scored))
    assert run(table) == (0 if message is None else 1)
    page = (table.parent / "out/page.md").read_text()
    alone = len(scored["videos"]) == 1  # a single value has no interval
    assert ("| full | 1 |" if alone else "| full | 1 [1, 1] |") in page
    assert "| other | 3 [3, 3] |" in page
    if message is not None:
        folder = next(path.parent for path in table.parent.glob("out/*/scores.json") if "3" not in path.read_text())
        assert refusal(capsys) == f"missing on the page: {message.format(folder)}"


def test_no_scores_over_the_seconds_are_told(table, capsys):
    for name in ("1", "2"):
        (table.parent / f"{name}.json").write_text(json.dumps({"videos": SCORES["videos"]}))
    table.write_text(table.read_text().replace("title: T", "title: T\ncurves: [drift]"))
    assert run(table) == 1
    assert "curves: no row has scores over the seconds of its videos" in refusal(capsys)


@pytest.mark.parametrize("differs", [{"videos": [{"id": 7, "drift": 1}]}, {"seconds": {"drift": [[1, 1], [2, 2]]}}])
def test_seeds_that_do_not_agree_are_told(table, differs, capsys):
    (table.parent / "3.json").write_text(json.dumps({**SCORES, "seconds": {}, **differs}))
    text = (
        table.read_text().replace("{change}.json", "{change}{seed}.json").replace("title: T", "title: T\nseeds: [0, 1]")
    )
    for name in ("1", "2"):
        for seed in ("0", "1"):
            source = "3" if (name, seed) == ("1", "1") else name
            (table.parent / f"{name}{seed}.json").write_text((table.parent / f"{source}.json").read_text())
    table.write_text(text.replace("title: T", "title: T\ncurves: [drift]"))
    assert run(table) == 1
    reason = (
        "full: seed 1 has other videos or metrics than seed 0" if "videos" in differs else "drift of full has another"
    )
    assert reason in refusal(capsys)
    assert "| other | 3 [3, 3] |" in (table.parent / "out/page.md").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"picture": 3}, "picture must be the name of a file beside it, got 3"),
        ({"picture": ["x"]}, "picture must be the name of a file beside it"),
        ({"seconds": [[1, 2]]}, "seconds must have a list for each video under each metric, got [[1, 2]]"),
        ({"seconds": 3}, "seconds must have a list for each video under each metric, got 3"),
        ({"videos": [{"id": 1}]}, "videos have no metric"),
        ({"videos": [{"id": 1, "drift": 10**400}]}, "OverflowError"),
    ],
)
def test_scores_of_other_kinds_are_one_line(tmp_path, change, message):
    (tmp_path / scores.FILE).write_text(json.dumps({**SCORES, **change}))
    with pytest.raises(scores.ScoreError) as caught:
        scores.read(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
