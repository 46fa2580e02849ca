"""Batches: a resumed run sees what an uninterrupted one does, and a host reads its rows of each global batch."""

import json
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helios_jax.data.loader import chunk_transform, clip_transform, loader
from helios_jax.data.records import RecordError


def tagged(i, rng):
    """An example that shows which record and which random choice it was made of."""
    return {"i": int(i), "r": int(rng.integers(2**30))}


def take(iterator, steps):
    # The range first: zip asks its first argument once more than its last.
    return [list(zip(batch["i"].tolist(), batch["r"].tolist())) for _, batch in zip(range(steps), iterator)]


def make(length=11, batch_size=4, seed=0, **kwargs):
    return loader(range(length), seed=seed, batch_size=batch_size, transform=tagged, **kwargs)


sizes = {"length": st.integers(1, 40), "seed": st.integers(0, 2**32 - 1)}


@given(done=st.integers(0, 9), batch_size=st.integers(1, 9), **sizes)
@settings(max_examples=25, deadline=None)
def test_resumed_loader_equals_uninterrupted_one(done, batch_size, **kwargs):
    whole = take(make(batch_size=batch_size, **kwargs), done + 4)
    first = make(batch_size=batch_size, **kwargs)
    assert take(first, done) == whole[:done]
    state = json.loads(json.dumps(first.get_state()))
    again = make(batch_size=batch_size, **kwargs)
    again.set_state(state)
    assert take(again, 4) == whole[done:]


@given(batch_size=st.integers(1, 9), data=st.data(), **sizes)
@settings(max_examples=25, deadline=None)
def test_a_host_reads_its_rows_of_every_global_batch(batch_size, data, **kwargs):
    rows = sorted(data.draw(st.sets(st.integers(0, batch_size - 1), min_size=1)))
    alone = take(make(batch_size=batch_size, **kwargs), 5)
    part = take(make(batch_size=batch_size, rows=rows, **kwargs), 5)
    assert part == [[batch[row] for row in rows] for batch in alone]


@given(length=st.integers(1, 30), epochs=st.integers(1, 3), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_every_example_is_seen_once_an_epoch_with_new_random_choices(length, epochs, seed):
    stream = list(chain.from_iterable(take(make(length, 1, seed), length * epochs)))
    for epoch in range(epochs):
        assert sorted(i for i, _ in stream[epoch * length : (epoch + 1) * length]) == list(range(length))
    assert len({r for _, r in stream}) == len(stream)


def test_epochs_and_seeds_have_their_own_order():
    order = [[i for i, _ in chain.from_iterable(take(make(50, 10, seed), 10))] for seed in (0, 1)]
    assert order[0][:50] != order[0][50:]
    assert order[0][:50] != order[1][:50]
    assert order[0][:50] != list(range(50))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 0}, "no examples"),
        ({"rows": [2, 4]}, r"rows \[2, 4\] are not of a batch of 4"),
        ({"rows": []}, r"rows \[\] are not of a batch of 4"),
        ({"seed": -1}, "seed is -1"),
        ({"batch_size": 0}, "batch of 0"),
    ],
)
def test_invalid_arguments_are_refused_in_one_line(change, message):
    with pytest.raises(ValueError, match=message) as error:
        make(**change)
    assert "\n" not in str(error.value)


def test_clips_are_consecutive_frames_from_anywhere_in_the_video():
    video = np.arange(12, dtype=np.uint8)[:, None, None, None]
    clip, firsts = clip_transform(9), set()
    for seed in range(60):
        got = clip({"video": video, "caption": "c"}, np.random.default_rng(seed))
        frames = got["video"].ravel().tolist()
        assert frames == list(range(frames[0], frames[0] + 9))
        assert got["caption"] == "c"
        firsts.add(frames[0])
    assert firsts == {0, 1, 2, 3}
    with pytest.raises(ValueError, match="12 frames is too short: a clip has 13"):
        clip_transform(13)({"video": video}, np.random.default_rng(0))


@given(
    chunks=st.integers(1, 5), frames=st.integers(1, 9), seed=st.integers(0, 99),
    size=st.integers(0, 48),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_chunk_has_its_history_and_anchor(chunks, frames, seed, size):
    # Latent frame f of the video holds f + 1 everywhere, so that zero means "before the video".
    flat = np.arange(1, chunks * frames + 1, dtype=np.float32)
    latents = np.broadcast_to(flat.reshape(chunks, frames, 1, 1, 1), (chunks, frames, 2, 3, 4))
    got = chunk_transform(size, frames)({"latents": latents, "text": "t"}, np.random.default_rng(seed))
    k = int(got["chunk"])
    assert got["target"].shape == (frames, 2, 3, 4)
    assert got["history"].shape == (size, 2, 3, 4)
    assert got["anchor"].shape == (1, 2, 3, 4)
    assert set(got) == {"target", "history", "anchor", "chunk", "text"}
    np.testing.assert_array_equal(got["target"][:, 0, 0, 0], flat[k * frames : (k + 1) * frames])
    expected = np.arange(k * frames - size + 1, k * frames + 1).clip(0)
    np.testing.assert_array_equal(got["history"][:, 1, 2, 3], expected)
    np.testing.assert_array_equal(got["anchor"], np.full((1, 2, 3, 4), 1.0 if k else 0.0))


def test_every_chunk_is_picked():
    latents = np.zeros((4, 9, 1, 1, 1), np.float32)
    pick = chunk_transform(19, 9)
    assert {int(pick({"latents": latents}, np.random.default_rng(s))["chunk"]) for s in range(60)} == {0, 1, 2, 3}
    with pytest.raises(ValueError, match=r"latents must be \[chunks, 8, h, w, c\], got \[4, 9, 1, 1, 1\]"):
        chunk_transform(1, 8)({"latents": latents}, np.random.default_rng(0))


def strict(i, rng):
    if i == 3:
        raise ValueError("its clip is too short")
    return tagged(i, rng)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_example_that_cannot_be_used_is_named(workers):
    batches = loader(range(7), seed=0, batch_size=1, transform=strict, workers=workers)
    rule = r"range\(0, 7\): record 3: its clip is too short, or leave it out with data\.leave_out=\[3\]"
    with pytest.raises(RecordError, match=rule) as error:
        take(batches, 7)
    assert "\n" not in str(error.value)


def test_all_bits_of_a_seed_count():
    seeds = (0, 1, 2**32, 2**32 + 1, 2**63, 2**64 - 1)
    assert len({str(take(make(20, seed=seed), 5)) for seed in seeds}) == len(seeds)
    with pytest.raises(ValueError, match="it must be 0 to 18446744073709551615"):
        make(seed=2**64)
