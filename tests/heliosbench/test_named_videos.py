"""From sample.py to HeliosBench: names, prompts, and videos that the sampler has made."""

import csv
import json
from pathlib import Path

import pytest

from helios_jax.heliosbench import bench_cli
from helios_jax.heliosbench.bench_videos import find_videos, read_prompts
from helios_jax.sampling.chunk_frames import ChunkFrames
from helios_jax.sampling.jobs import make_jobs
from helios_jax.sampling.options import SampleConfig
from tests.tiny_run import run

PROMPTS = Path(__file__).resolve().parents[3] / "shared" / "heliosbench" / "helios_t2v_prompts.csv"


@pytest.mark.skipif(not PROMPTS.is_file(), reason="the benchmark's prompts are not beside the checkout")
def test_all_names_of_the_benchmark_are_read(tmp_path):
    jobs = make_jobs(
        SampleConfig(csv=str(PROMPTS), out=str(tmp_path / "videos"), naming="heliosbench"), ChunkFrames(33, 33)
    )
    (tmp_path / "videos").mkdir()
    for job in jobs:
        job.out.touch()
    videos, left_out = find_videos(tmp_path / "videos", read_prompts(PROMPTS))
    assert left_out == []
    with PROMPTS.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(video.id, video.prompt) for video in videos] == [(int(row["id"]), row["prompt"]) for row in rows]
    frames = [f"{row['id']}_{row['duration']}_ori{row['duration']}.mp4" for row in rows]
    assert [video.path.name for video in videos] == frames


def test_sampled_videos_are_judged(config, tmp_path, capsys):
    pytest.importorskip("cv2")
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("id,prompt,duration\n3,a red plus,18\n5,a blue bar,13\n")
    assert run(config, "--csv", prompts, "--out", tmp_path / "tiny", "--naming", "heliosbench", "--fps", "16") == 0
    arguments = [str(tmp_path / "tiny"), "--prompts", str(prompts), "--out", str(tmp_path / "out")]
    assert bench_cli.main([*arguments, "--size", "32x48", "--chunk", "9"]) == 0
    found = {
        name: json.loads((tmp_path / "out" / "tiny" / f"{name}_results.json").read_text())
        for name in ("motion_amplitude", "border_jumps")
    }
    for one in found.values():
        assert [item["video_name"] for item in one["per_video_results"]] == ["3_18_ori18.mp4", "5_13_ori13.mp4"]
    names = ("3_18_ori18", "5_13_ori13")
    records = [json.loads((tmp_path / "out" / "tiny" / "videos" / f"{name}.json").read_text()) for name in names]
    assert [record["frames"] for record in records] == [18, 13]
    assert "tiny: total" in capsys.readouterr().out
