"""Progress of a run: the time left, and lines that do not tear the bars."""

import io
import logging
import sys

import jax.numpy as jnp
import pytest
from flax import nnx

from helios_jax.runtime.command import Lines
from helios_jax.runtime.program import before_compiling, program
from helios_jax.sampling.progress import RunProgress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_time_left_is_of_the_chunks_of_all_videos(capsys):
    clock = [0.0]
    shown = RunProgress([4, 4, 4], lambda: clock[0])
    shown.begin(0, "id 7")
    for done in range(1, 5):
        clock[0] += 60.0 if done == 1 else 2.0  # the first one is compiled
        shown.chunk(done, 4, 9 * done)
    shown.begin(1, "id 8")  # and fails
    shown.begin(2, "id 9")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == ["chunk 1/4  9 frames", "chunk 2/4  18 frames, about 0:00:20 left"]
    videos = [line for line in lines if line.startswith("video ")]
    assert videos == ["video 1/3: id 7", "video 2/3: id 8, about 0:00:16 left", "video 3/3: id 9, about 0:00:08 left"]


@pytest.mark.parametrize("chunks", [[2], [None], [None, None]])
def test_a_video_without_end_has_no_time_left(chunks, capsys):
    shown = RunProgress(chunks, None)
    for video, total in enumerate(chunks):
        shown.begin(video, "video")
        shown.chunk(1, total, 9)
        shown.chunk(2, total, 18)
    out = capsys.readouterr().out
    assert "left" not in out
    assert out.count("video ") == (len(chunks) if len(chunks) > 1 else 0)
    assert f"chunk 2/{chunks[0] or '-'}  18 frames" in out


@program()
def doubled(model, x):
    return 2 * x


def test_compiling_is_said_before_each_compilation_and_only_then(capsys):
    model, said = nnx.Linear(1, 1, rngs=nnx.Rngs(0)), []
    with before_compiling(lambda: said.append(1)):
        for size in (2, 2, 3):
            doubled(model, jnp.ones(size))
    doubled(model, jnp.ones(4))
    assert len(said) == 2
    with RunProgress([1]):
        for size in (5, 6):
            doubled(model, jnp.ones(size))
    assert capsys.readouterr().out == "compiling: the first chunk takes longer\n"


def test_lines_come_above_the_bars(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    log, lines = logging.getLogger("helios_jax.test"), Lines("sample.py")
    log.addHandler(lines)
    try:
        with RunProgress([2]) as shown:
            shown.begin(0, "video")
            doubled(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), jnp.ones(7))
            log.warning("a line of the log")
    finally:
        log.removeHandler(lines)
    written = terminal.getvalue()
    assert "compiling" in written
    before, _, after = written.partition("sample.py: a line of the log")
    assert before.endswith("\x1b[2K")  # the bar was erased
    assert after.startswith("\n")
