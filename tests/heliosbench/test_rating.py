"""Ratings, totals and result files: upstream's, on its published files and at every edge."""

import json
import shutil
from pathlib import Path

import pytest

from helios_jax.config import ConfigError
from helios_jax.heliosbench import rating, result_files
from helios_jax.heliosbench.rating import DRIFTS, METRICS, normalized, rate, throughput_score, total

PUBLISHED = Path(__file__).resolve().parents[3] / "shared" / "heliosbench"
published = pytest.mark.skipif(not PUBLISHED.is_dir(), reason="upstream's published files are not beside the checkout")


@published
@pytest.mark.parametrize("strict", [False, True])
def test_published_results_merge_to_the_published_summary(strict):
    folder = PUBLISHED / "toy-video"
    merged = result_files.merge(folder, "long", strict)
    assert merged == json.loads((folder / "merged_results.json").read_text())
    assert list(merged["summary"]["non_drifting"]) == [
        "aesthetic", "motion_amplitude", "motion_smoothness", "naturalness", "semantic"
    ]  # fmt: skip
    assert merged["summary"]["total_weighted_rating"] == 8.247
    everything = result_files.merge_models({"toy-video": merged})
    assert everything == json.loads((PUBLISHED / "all_models_merged.json").read_text())


@published
def test_published_results_as_short_videos():
    merged = result_files.merge(PUBLISHED / "toy-video", "short")
    assert merged["summary"]["drifting"] == {}
    assert merged["summary"]["total_weighted_rating"] == round(0.1 * (9 + 3 + 10) + 0.35 * (8 + 7), 4)


@published
@pytest.mark.parametrize("metric", METRICS["long"])
def test_files_are_written_as_they_were_published(metric):
    path = PUBLISHED / "toy-video" / f"{metric}_results.json"
    data = json.loads(path.read_text())
    facts = {key: data[key] for key in ("model_name", "num_frames_per_video") if key in data}
    ours = result_files.results(metric, reversed(data["per_video_results"]), **facts)
    assert ours == data
    assert list(ours) == list(data)


@pytest.mark.parametrize("length", ["short", "long"])
@pytest.mark.parametrize("metric", METRICS["long"])
def test_every_threshold_is_inclusive(metric, length):
    for i, threshold in enumerate(rating.THRESHOLDS[metric]):
        worse = threshold + (1e-9 if metric in DRIFTS else -1e-9)
        assert rate(metric, threshold, length) == 10 - i
        assert rate(metric, worse, length) == 9 - i
    best, worst = (0.0, 1.0) if metric in DRIFTS else (1.0, 0.0)
    assert (rate(metric, best, length), rate(metric, worst, length)) == (10, 1)
    assert rate(metric, None, length) is None


def test_low_aesthetic_scores_of_long_videos():
    """Upstream's table repeats two thresholds, so that it never gives 3 and 2."""
    scores = (0.41, 0.40, 0.39, 0.35, 0.34, 0.30, 0.29)
    assert [rate("aesthetic", x, "long") for x in scores] == [4, 4, 3, 3, 2, 2, 1]
    assert [rate("aesthetic", x, "long", strict=True) for x in scores] == [4, 4, 1, 1, 1, 1, 1]
    assert [rate("aesthetic", x, "short", strict=True) for x in scores] == [4, 4, 3, 3, 2, 2, 1]


def write(folder: Path, metric: str, **data) -> None:
    (folder / f"{metric}_results.json").write_text(json.dumps(data))


def test_a_score_of_zero(tmp_path):
    """Upstream takes an average of 0 for a missing one, but of drifts not."""
    write(tmp_path, "naturalness", average_score=0.0, num_videos=2)
    write(tmp_path, "drifting_naturalness", average_drift_score=0.0, num_videos=2)
    ours, theirs = (result_files.merge(tmp_path, "long", strict)["summary"] for strict in (False, True))
    assert ours["non_drifting"]["naturalness"]["rating"] == 1
    assert theirs["non_drifting"]["naturalness"] == {
        "name": "Naturalness", "raw_score": None, "normalized_score": None, "rating": None, "num_videos": 2
    }  # fmt: skip
    assert ours["drifting"]["drifting_naturalness"]["rating"] == 10
    assert theirs["drifting"] == ours["drifting"]
    assert ours["total_weighted_rating"] == round(0.255 + 0.99, 4)
    assert "naturalness" in result_files.missing(theirs, "long")
    assert "naturalness" not in result_files.missing(ours, "long")


def test_scores_outside_0_and_1_and_no_numbers():
    assert [normalized(x) for x in (-0.5, 0, 0.25, 1, 7.5)] == [0.0, 0.0, 0.25, 1.0, 1.0]
    assert [normalized(x) for x in (None, "0.5", True, float("nan"))] == [None] * 4


def test_totals():
    assert total(dict.fromkeys(METRICS["short"], 10), "short") == 10.0
    assert total(dict.fromkeys(METRICS["long"], 10), "long") == 9.96
    assert total({}, "long") == 0.0
    assert total({"semantic": 8, "naturalness": None}, "short") == 2.8


@published
def test_a_missing_metric_makes_the_total_partial(tmp_path):
    for path in (PUBLISHED / "toy-video").iterdir():
        shutil.copyfile(path, tmp_path / path.name)
    (tmp_path / "semantic_results.json").unlink()
    summary = result_files.merge(tmp_path, "long")["summary"]
    assert result_files.missing(summary, "long") == ["semantic"]
    assert summary["total_weighted_rating"] == round(8.247 - 8 * 0.255, 4)


@pytest.mark.parametrize("text", ["", "[1]", "{"])
def test_a_damaged_file_is_named(tmp_path, text):
    (tmp_path / "semantic_results.json").write_text(text)
    with pytest.raises(ConfigError, match=r"semantic_results\.json: .*remove it"):
        result_files.merge(tmp_path, "long")


SPEEDS = {0.1: 1, 3.2: 1, 3.21: 2, 6.4: 2, 19.5: 7, 31.9: 10, 32: 10, 99: 10}


@pytest.mark.parametrize(("fps", "score"), SPEEDS.items())
def test_throughput_score(fps, score):
    assert throughput_score(fps) == score
