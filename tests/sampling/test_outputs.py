"""Files of a run that are no files, and facts that are none: one line before anything is read or written."""

import os
from pathlib import Path

import pytest

from helios_jax.sampling import outputs
from helios_jax.sampling.jobs import make_jobs
from helios_jax.sampling.options import SampleConfig
from helios_jax.sampling.stream import read_state


def check(out: Path, **changes) -> None:
    (job,) = make_jobs(SampleConfig(prompt="a", out=str(out), **changes), 33)
    outputs.check(job)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("state", ["pipe", ".", "/dev/full"])
def test_a_state_is_a_regular_file(tmp_path, state, overwrite):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"is a (folder|device)"):
        check(tmp_path / "x.mp4", state=str(tmp_path / state), overwrite=overwrite)


@pytest.mark.parametrize("text", ["3", "[]", "null", "{", "[" * 100_000, "\xff"])
def test_a_file_that_holds_no_facts_is_another_file(tmp_path, text):
    (tmp_path / "x.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"x\.json.* is another file"):
        check(tmp_path / "x.mp4")
    check(tmp_path / "x.mp4", overwrite=True)


def test_a_state_that_is_no_file_is_no_state(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(ValueError, match="not the state of a stream"):
            read_state(path)


def test_the_home_folder_is_named_by_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    config = SampleConfig(prompt="a", out="~/x.mp4", state="~/s", loras=["~/l.safetensors=0.5"])
    assert (config.out, config.state) == ("/home/someone/x.mp4", "/home/someone/s")
    assert config.loras == ["/home/someone/l.safetensors=0.5"]
