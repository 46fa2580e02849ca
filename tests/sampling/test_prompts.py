"""Prompt schedules: which text has which weight in which chunk."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios_jax.sampling.chunk_frames import ChunkFrames
from helios_jax.sampling.options import PromptSwitch, SamplingOptions
from helios_jax.sampling.prompts import Entry, Schedule, make_schedule

FRAMES = ChunkFrames(33, 33)
A, B, C = (("a",), ("b",), ("c",))


def upstream(counts: list[int], steps: int) -> list[dict]:
    """The weights of each chunk by upstream's rule: lerp over linspace(0, 1, steps) after each switch."""
    rows = []
    for i, count in enumerate(counts):
        for position in range(count):
            weight = np.linspace(0, 1, steps)[position] if i and position < steps else 1.0
            mix = {i: weight} | ({i - 1: 1 - weight} if i else {})
            rows.append({key: value for key, value in mix.items() if value > 0})
    return rows


@given(st.lists(st.integers(2, 9), min_size=1, max_size=5), st.integers(0, 6))
def test_weights_are_upstreams(counts, steps):
    counts = [max(count, steps + 1) for count in counts]  # upstream asserts this
    starts = [0, *itertools.accumulate(counts)][:-1]
    schedule = Schedule(tuple(Entry(start, (str(i),), steps) for i, start in enumerate(starts)))
    for chunk, expected in enumerate(upstream(counts, steps)):
        got = {int(prompts[0]): weight for prompts, weight in schedule.mixture(chunk)}
        assert got == pytest.approx(expected), chunk


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 5)), max_size=5))
def test_pruning_changes_no_chunk_to_come(steps):
    entries, chunk = [Entry(0, A)], 0
    for i, (gap, crossfade) in enumerate(steps):
        chunk += gap
        entries.append(Entry(chunk, (str(i),), crossfade))
    whole = pruned = Schedule(tuple(entries))
    for now in range(chunk + 7):
        pruned = pruned.prune(now)
        for later in range(now, chunk + 7):
            assert pruned.mixture(later) == whole.mixture(later)
    assert len(pruned.entries) == 1


def test_a_switch_during_a_fade_starts_from_what_was_reached():
    schedule = Schedule((Entry(0, A), Entry(1, B, 3), Entry(3, C, 2)))
    assert schedule.mixture(2) == ((A, 0.5), (B, 0.5))
    assert schedule.mixture(3) == ((A, 0.5), (B, 0.5))
    assert schedule.mixture(4) == ((C, 1.0),)


def test_a_switch_replaces_what_was_planned_later():
    schedule = Schedule((Entry(0, A), Entry(4, B))).switch(Entry(2, C))
    assert [schedule.mixture(i)[0][0] for i in range(6)] == [A, A, C, C, C, C]


def test_seconds_mean_the_chunk_they_fall_into():
    options = SamplingOptions(num_frames=330, fps=24)
    switches = [PromptSwitch("b", seconds=2.0), PromptSwitch("c", seconds=5.6, crossfade=0), PromptSwitch("d", chunk=9)]
    entries = make_schedule(["a", "x"], switches, options, FRAMES).entries
    assert entries == (
        Entry(0, ("a", "x")),
        Entry(1, ("b", "b"), 3),
        Entry(4, ("c", "c"), 0),
        Entry(9, ("d", "d"), 3),
    )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PromptSwitch("", chunk=2), ["empty"]),
        (lambda: PromptSwitch("b"), ["chunk or seconds", "'b'"]),
        (lambda: PromptSwitch("b", chunk=1, seconds=2.0), ["chunk or seconds"]),
        (lambda: PromptSwitch("b", chunk=0), ["chunk", "at least 1"]),
        (lambda: PromptSwitch("b", seconds=-1.0), ["seconds", "-1.0"]),
        (lambda: PromptSwitch("b", chunk=1, crossfade=-1), ["crossfade"]),
        (
            lambda: make_schedule(["a"], [PromptSwitch("b", chunk=4)], SamplingOptions(num_frames=132), FRAMES),
            ["'b'", "4 chunks"],
        ),
        (
            lambda: make_schedule(["a"], [PromptSwitch("b", seconds=1.0)], SamplingOptions(), FRAMES),
            ["'b'", "'a'", "chunk 0"],
        ),
        (
            lambda: make_schedule(
                ["a"], [PromptSwitch("b", chunk=2), PromptSwitch("c", seconds=3.0)], SamplingOptions(), FRAMES
            ),
            ["'c'", "chunk 2", "'b'"],
        ),
    ],
)
def test_bad_switches_are_named(make, words):
    with pytest.raises(ValueError) as error:
        make()
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)
