"""The benchmark's command on small videos: names, results, what goes on after an interrupt, and what is left out."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from helios_jax.ablations import scores
from helios_jax.heliosbench import bench_cli, measure, table_scores
from helios_jax.media.mp4 import VideoWriter
from tests.heliosbench.fake_judge import serve

pytest.importorskip("cv2")
PUBLISHED = Path(__file__).resolve().parents[3] / "shared" / "heliosbench"
published = pytest.mark.skipif(not PUBLISHED.is_dir(), reason="upstream's published files are not beside the checkout")


def write(path: Path, frames: int, step: int = 1, height: int = 48, width: int = 96) -> Path:
    """A texture that moves to the right by `step` pixels a frame."""
    noise = np.random.default_rng(0).integers(0, 255, (height // 4, width // 4, 3), np.uint8)
    noise = noise.repeat(4, 0).repeat(4, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with VideoWriter(path, 24, height, width) as video:
        video.write(np.stack([np.roll(noise, step * i, 1) for i in range(frames)]))
    return path


@pytest.fixture
def bench(tmp_path):
    """A folder with two models' videos and prompts, and a function that runs the command there."""
    for model, step in (("ours", 1), ("theirs", 3)):
        for number, frames in ((1, 70), (12, 40)):
            write(tmp_path / model / f"{number}_80_ori{frames}.mp4", frames, step)
    (tmp_path / "prompts.csv").write_text('id,prompt,duration\n1,"red, then green",80\n2,two,80\n12,twelve,80\n')

    class Bench:
        folder, out = tmp_path, tmp_path / "out"

        def run(self, *arguments: str, models=("ours",), workers=1) -> int:
            folders = [str(tmp_path / model) for model in models]
            flags = ["--prompts", str(tmp_path / "prompts.csv"), "--out", str(self.out), "--size", "48x96"]
            return bench_cli.main([*folders, *flags, "--workers", str(workers), *arguments])

        def results(self, metric: str, model="ours") -> dict:
            return json.loads((self.out / model / f"{metric}_results.json").read_text())

    return Bench()


def test_a_run_writes_upstreams_layout(bench, capsys):
    assert bench.run(models=("ours", "theirs")) == 0
    ours, theirs = bench.results("motion_amplitude"), bench.results("motion_amplitude", "theirs")
    assert (ours["metric"], ours["num_videos"]) == ("motion_fb", 2)
    assert [item["id"] for item in ours["per_video_results"]] == [1, 12]
    assert ours["per_video_results"][0]["video_name"] == "1_80_ori70.mp4"
    assert ours["average_score"] == pytest.approx(0.5, abs=0.1)
    assert theirs["average_score"] == pytest.approx(1.5, abs=0.3)
    merged = bench.results("merged", "theirs")
    assert merged["summary"]["non_drifting"]["motion_amplitude"]["rating"] == 10
    everything = json.loads((bench.out / "all_models_merged.json").read_text())
    assert everything["models"]["theirs"] == {"motion_amplitude": 10, "total_weighted_rating": 0.3}
    assert set(bench.results("border_jumps")["per_video_results"][0]) > {"border_jumps_score", "across_borders"}
    said = capsys.readouterr()
    assert "ours: total 0.3 (partial, without aesthetic," in said.out
    assert "naturalness: missing: no judge" in said.err


def test_the_report(bench):
    assert bench.run("--fps", "theirs=19.5", models=("ours", "theirs")) == 0
    page = (bench.out / "report.html").read_text()
    for text in ("Helios-Distilled*", "6.94", "partial", "red, then green", "missing", "<polyline", ">(19.5)<"):
        assert text in page
    images = re.findall(r'src="([^"]+)"', page)
    assert len(images) == 4
    assert all((bench.out / image).stat().st_size > 500 for image in images)
    assert "http" not in page.replace("https://arxiv.org", "")


def test_a_second_run_measures_only_what_changed(bench, monkeypatch):
    bench.run()
    measured, work = [], measure.measure
    monkeypatch.setattr(measure, "measure", lambda video, *rest: measured.append(video.id) or work(video, *rest))
    before = bench.results("motion_amplitude")
    assert bench.run() == 0
    assert measured == []
    assert bench.results("motion_amplitude") == before
    (bench.folder / "ours" / "1_80_ori70.mp4").touch()
    write(bench.folder / "ours" / "12_80_ori40.mp4", 41)
    bench.run()
    assert measured == [12]
    bench.run("--chunk", "20")
    assert measured == [12, 1, 12]
    assert bench.results("border_jumps")["num_videos"] == 2
    bench.run("--chunk", "20", "--metrics", "motion_amplitude")
    assert measured == [12, 1, 12]


def test_one_model_s_scores_are_a_result_for_a_table_of_ablations(bench):
    assert bench.run() == 0
    found = scores.read(bench.out)
    assert found.ids == ("1", "12")
    amplitudes = [item["motion_fb"] for item in bench.results("motion_amplitude")["per_video_results"]]
    assert found.metrics["motion_amplitude"].tolist() == amplitudes
    assert found.picture == bench.out / "sheet.jpg"
    assert found.picture.is_file()


def test_curves_are_means_over_seconds():
    records = [{"curves": {"a": [(i, i) for i in range(48)], "b": [(30, 1.0)]}}] * 2
    assert table_scores._seconds(records) == {"a": [[11.5, 35.5]] * 2}  # b has no value in the first second


def test_a_bad_video_is_named_and_skipped(bench, capsys):
    (bench.folder / "ours" / "2_80_ori5.mp4").write_bytes(b"no video")
    write(bench.folder / "ours" / "4_80_ori5.mp4", 5, height=8, width=96 * 16)
    with (bench.folder / "prompts.csv").open("a") as file:
        file.write("4,four,5\n")
    (bench.folder / "ours" / "3_80_ori5.mp4").write_bytes(b"no prompt")
    (bench.folder / "ours" / "x_80_ori5.mp4").write_bytes(b"no id")
    (bench.folder / "ours" / "5.mp4").write_bytes(b"no frames")
    assert bench.run() == 1
    said = capsys.readouterr().err
    assert "left out: 3_80_ori5.mp4: the prompts have no id 3" in said
    for name in ("x_80_ori5.mp4", "5.mp4"):
        assert f"left out: {name}: its name is not of the form of 2_240_ori264.mp4" in said
    assert re.search(r"ours/2_80_ori5.mp4: skipped: .* does not decode", said)
    assert "1536x8 pixels become 96x0 here; each side must have 16 or more" in said
    assert bench.results("motion_amplitude")["num_videos"] == 2
    assert re.search(r"Not measured.*2_80_ori5\.mp4: ", (bench.out / "report.html").read_text())


def test_several_processes_give_the_same(bench):
    assert bench.run(workers=2) == 0
    several = bench.results("motion_amplitude")
    shutil.rmtree(bench.out)
    bench.run(workers=1)
    assert bench.results("motion_amplitude") == several


def test_short_videos_are_the_first_81_frames(bench, capsys):
    write(bench.folder / "ours" / "2_80_ori100.mp4", 100)
    assert bench.run("--length", "short") == 0
    record = json.loads((bench.out / "ours/videos/2_80_ori100.json").read_text())
    assert record["frames"] == 81
    assert len(record["curves"]["motion_amplitude"]) == 80
    assert bench.run() == 2
    assert "holds results of short videos" in capsys.readouterr().err


def test_naturalness(bench, capsys):
    with serve("5", "2", "4") as fake:
        assert bench.run("--judge", fake.url, "--judge-model", "m", "--judge-threads", "1", "--judge-price", "2") == 0
        assert fake.pictures == [16, 10, 10, 16, 6, 6]
        said = capsys.readouterr().out
        assert re.search(r"judge m: 6 requests with 96 pictures, about [\d,]+ tokens of input, \$0.0\d at \$2 a", said)
        assert bench.run("--judge", fake.url, "--judge-model", "m") == 0
        assert len(fake.requests) == 6  # nothing is asked twice
        bench.run("--judge", fake.url, "--judge-model", "other")
        assert len(fake.requests) == 12
    whole, drift = bench.results("naturalness"), bench.results("drifting_naturalness")
    assert whole["model_name"] == drift["model_name"] == "other"
    assert list(whole) == [
        "metric", "average_score", "num_videos", "model_name", "num_frames_per_video", "per_video_results"
    ]  # fmt: skip
    assert set(drift["per_video_results"][0]) == {
        "id", "video_name", "drift_naturalness_score", "start_naturalness_score", "end_naturalness_score",
        "start_raw_score", "end_raw_score",
    }  # fmt: skip


def test_scores_of_a_judge(bench):
    with serve("5", "2", "4", "3", "3", "1") as fake:
        bench.run("--judge", fake.url, "--judge-threads", "1")
    whole, drift = bench.results("naturalness"), bench.results("drifting_naturalness")
    assert [item["naturalness_score"] for item in whole["per_video_results"]] == [1.0, 0.5]
    assert [item["drift_naturalness_score"] for item in drift["per_video_results"]] == [0.5, 0.5]
    assert (whole["average_score"], drift["average_drift_score"]) == (0.75, 0.5)


def test_a_judge_that_fails_leaves_the_other_metrics(bench, capsys):
    with serve("3", "3", "3", "nonsense") as fake:
        assert bench.run("--judge", fake.url, "--judge-threads", "1") == 1
    assert "12_80_ori40.mp4, naturalness: skipped: gpt-5.2-2025-12-11 answered 'nonsense'" in capsys.readouterr().err
    assert bench.results("naturalness")["num_videos"] == 1
    assert bench.results("motion_amplitude")["num_videos"] == 2
    with serve("4") as fake:  # the next run asks for the rest
        assert bench.run("--judge", fake.url) == 0
        assert len(fake.requests) == 3


def test_a_judge_that_refuses_ends_the_run_and_keeps_what_is_done(bench, capsys):
    with serve(401) as fake:
        assert bench.run("--judge", fake.url, "--judge-threads", "1") == 1
    assert "refuses gpt-5.2" in capsys.readouterr().err


def test_a_dry_run_measures_nothing(bench, capsys):
    with serve("3") as fake:
        assert bench.run("--judge", fake.url, "--dry-run") == 0
        assert fake.requests == []
    assert "2 videos, of which 2 are to be measured" in capsys.readouterr().out
    assert not (bench.out / "report.html").exists()


@published
def test_upstreams_results_count_as_measured(tmp_path, capsys):
    """Scores that need weights or a service can come from upstream's scripts."""
    videos, out = tmp_path / "toy-video", tmp_path / "out"
    shutil.copytree(PUBLISHED / "videos", videos)
    shutil.copytree(PUBLISHED / "toy-video", out / "toy-video")
    for path in (out / "toy-video").iterdir():
        path.chmod(0o644)
    prompts = str(PUBLISHED / "helios_t2v_prompts.csv")
    assert bench_cli.main([str(videos), "--prompts", prompts, "--out", str(out), "--metrics", "naturalness"]) == 0
    for path in (PUBLISHED / "toy-video").glob("*_results.json"):
        assert json.loads((out / "toy-video" / path.name).read_text()) == json.loads(path.read_text()), path.name
    theirs = json.loads((PUBLISHED / "all_models_merged.json").read_text())
    assert json.loads((out / "all_models_merged.json").read_text()) == theirs
    assert "toy-video: total 8.247 (complete)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--size", "384"], "--size is '384'"),
        (["--workers", "0"], "must be a number from 1 up"),
        (["--workers", "²"], "must be a number from 1 up, got ²"),
        (["--chunk", "1", "--overlap"], "--overlap needs chunks of 2 frames or more, got --chunk 1"),
        (["--metrics", "beauty"], "invalid choice: 'beauty'"),
        (["--judge", "localhost"], "--judge: localhost must be an address"),
        (["--judge", "http://x", "--judge-instruction", "nowhere"], "--judge-instruction: nowhere cannot be read"),
        (["--fps", "ours"], "--fps: ours must read NAME=FPS"),
        (["--fps", "mine=3"], "with a name of ours"),
        (["--prompts", "nowhere.csv"], "nowhere.csv is no file"),
    ],
)
def test_input_that_cannot_be_used(bench, capsys, arguments, reason):
    assert bench.run(*arguments) == 2
    said = capsys.readouterr().err
    assert reason in said
    assert said.count("\n") == 1


def test_folders_that_cannot_be_used(bench, capsys):
    (bench.folder / "empty").mkdir()
    for models, reason in (
        (("empty",), "holds no video to judge"),
        (("none",), "is no folder"),
        (("ours", "ours"), "two folders are named ours"),
    ):
        assert bench.run(models=models) == 2
        assert reason in capsys.readouterr().err
    write(bench.folder / "ours" / "1_90_ori70.mp4", 5)
    assert bench.run() == 2
    assert "has id 1, too; keep one of them" in capsys.readouterr().err


def test_a_signal_ends_the_run_and_the_same_command_goes_on(bench):
    """All videos that were measured by then are kept, and processes that measure end, too."""
    for number in range(20, 28):
        write(bench.folder / "ours" / f"{number}_80_ori99.mp4", 99)
        with (bench.folder / "prompts.csv").open("a") as file:
            file.write(f"{number},more,99\n")
    flags = ["--prompts", "prompts.csv", "--out", "out", "--size", "48x96", "--workers", "2"]
    command = [sys.executable, "-m", "helios_jax.heliosbench", "ours", *flags]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    process = subprocess.Popen(
        command, cwd=bench.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("2/10"):
            break
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)  # ends when the processes that measure have closed it
    assert process.returncode == 130
    assert "heliosbench: interrupted by SIGTERM" in said
    kept = len(list((bench.out / "ours" / "videos").glob("*.json")))
    assert 2 <= kept < 10
    goes_on = subprocess.run(command, cwd=bench.folder, env=environment, capture_output=True, text=True, check=True)
    assert f"10 videos, of which {10 - kept} are to be measured" in goes_on.stdout
    assert bench.results("motion_amplitude")["num_videos"] == 10
