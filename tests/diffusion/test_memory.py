"""The history window: fixed shape, positions that do not grow, an anchor that stays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helios_jax.diffusion import memory
from helios_jax.diffusion.memory import MemoryConfig


def chunk(k: int, frames: int):
    """Latents whose value is their frame's number in the video, counted from one."""
    return jnp.broadcast_to(jnp.arange(1.0, frames + 1)[None, :, None, None, None] + k * frames, (2, frames, 2, 2, 1))


@given(
    sizes=st.tuples(st.integers(0, 16), st.integers(0, 4), st.integers(1, 3)),
    frames=st.integers(1, 9),
    chunks=st.integers(0, 4),
)
@settings(max_examples=25, deadline=None)
def test_the_window_is_the_newest_frames(sizes, frames, chunks):
    config = MemoryConfig(*sizes, frames_per_chunk=frames)
    history = memory.empty(config, 2, 2, 2, 1)
    for k in range(chunks):
        history = memory.push(history, chunk(k, frames))
    parts, indices = memory.window(config, history)
    video = [0.0] * 100 + [float(i) for i in range(1, frames * chunks + 1)]
    seen = [x[0, :, 0, 0, 0] for x in (parts.long, parts.mid, parts.short[:, 1:]) if x is not None]
    np.testing.assert_array_equal(np.concatenate(seen), video[-config.frames :])
    assert float(parts.short[0, 0, 0, 0, 0]) == (
        1.0 if chunks else 0.0
    )  # the anchor: the first frame, once it is there
    rows = [indices.long, indices.mid, indices.short[:, 1:], indices.noisy]
    row = np.concatenate([r[0] for r in rows if r is not None])
    np.testing.assert_array_equal(row, np.arange(1, config.frames + frames + 1))
    assert int(indices.short[0, 0]) == 0


def test_released_positions():
    _, indices = memory.window(MemoryConfig(), memory.empty(MemoryConfig(), 1, 2, 2, 1))
    assert indices.long.tolist() == [list(range(1, 17))]
    assert indices.mid.tolist() == [[17, 18]]
    assert indices.short.tolist() == [[0, 19]]
    assert indices.noisy.tolist() == [list(range(20, 29))]


def test_absolute_positions_count_on():
    config = MemoryConfig(4, 2, 1, frames_per_chunk=3, positions="absolute")
    history = memory.push(memory.empty(config, 1, 2, 2, 1), chunk(0, 3)[:1])
    _, indices = memory.window(config, history)
    assert indices.noisy.tolist() == [[11, 12, 13]]
    per_sample = history.replace(chunk=jnp.array([0, 2]))
    assert memory.window(config, per_sample)[1].noisy[:, 0].tolist() == [8, 14]


def test_no_anchor():
    config = MemoryConfig(4, 2, 1, anchor=None, frames_per_chunk=3)
    parts, indices = memory.window(config, memory.empty(config, 1, 2, 2, 1))
    assert parts.short.shape[1] == indices.short.shape[1] == 1
    assert indices.long[0, 0] == 0


def test_history_keeps_its_shape_under_scan():
    config = MemoryConfig()
    chunks = jnp.stack([chunk(k, 9) for k in range(5)])
    history, _ = jax.lax.scan(lambda h, x: (memory.push(h, x), None), memory.empty(config, 2, 2, 2, 1), chunks)
    assert history.latents.shape == (2, 19, 2, 2, 1)
    assert float(history.latents[0, -1, 0, 0, 0]) == 45
    assert int(history.chunk) == 5


def test_sizes_that_cannot_be():
    with pytest.raises(ValueError, match="recent"):
        MemoryConfig(recent=0)
