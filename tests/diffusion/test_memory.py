"""The history window: fixed shape, positions that do not grow, an anchor that stays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helios_jax.diffusion import memory
from helios_jax.diffusion.memory import MemoryConfig
from helios_jax.training.flow_config import FlowConfig


def chunk(k: int, frames: int):
    """Latents whose value is their frame's number in the video, counted from one."""
    return jnp.broadcast_to(jnp.arange(1.0, frames + 1)[None, :, None, None, None] + k * frames, (2, frames, 2, 2, 1))


@pytest.mark.parametrize("chunks", [0, 1, 4])
@pytest.mark.parametrize(("sizes", "frames"), [((16, 2, 1), 9), ((7, 0, 2), 3), ((0, 4, 1), 1), ((0, 0, 3), 4)])
def test_the_window_is_the_newest_frames(sizes, frames, chunks):
    config = MemoryConfig(*sizes, frames_per_chunk=frames)
    history = memory.empty(config, 2, 2, 2, 1)
    for k in range(chunks):
        history = memory.push(history, chunk(k, frames), config)
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
    history = memory.push(memory.empty(config, 1, 2, 2, 1), chunk(0, 3)[:1], config)
    _, indices = memory.window(config, history)
    assert indices.noisy.tolist() == [[11, 12, 13]]
    per_sample = history.replace(chunk=jnp.array([0, 2]))
    assert memory.window(config, per_sample)[1].noisy[:, 0].tolist() == [8, 14]
    after_video = memory.push(history.replace(before=jnp.asarray(4)), chunk(1, 3)[:1], config)
    assert memory.window(config, after_video)[1].noisy[:, 0].tolist() == [8 + 3 * (4 + 2)]


def test_no_anchor():
    config = MemoryConfig(4, 2, 1, anchor=None, frames_per_chunk=3)
    parts, indices = memory.window(config, memory.empty(config, 1, 2, 2, 1))
    assert parts.short.shape[1] == indices.short.shape[1] == 1
    assert indices.long[0, 0] == 0


def anchors(history, config, chunks=4):
    """The anchor's value that each chunk sees, one row per chunk."""
    seen = []
    for k in range(chunks):
        seen.append(memory.window(config, history)[0].short[:, 0, 0, 0, 0].tolist())
        history = memory.push(history, chunk(k, 3), config)
    return seen


@pytest.mark.parametrize("per_sample", [False, True])
def test_the_second_chunk_takes_the_anchors_place(per_sample):
    first, second = (MemoryConfig(4, 2, 1, anchor=a, frames_per_chunk=3) for a in ("first", "second"))
    history = memory.empty(first, 2, 2, 2, 1)
    if per_sample:
        history = history.replace(chunk=jnp.array([0, 0]))
    assert [row[0] for row in anchors(history, first)] == [0, 1, 1, 1]
    assert [row[0] for row in anchors(history, second)] == [0, 1, 4, 4]
    given = history.replace(anchor=jnp.full((2, 1, 2, 2, 1), -7.0), anchored=jnp.asarray(True))
    assert [row[0] for row in anchors(given, first)] == [-7, -7, -7, -7]
    assert [row[0] for row in anchors(given, second)] == [-7, -7, 4, 4]


def test_each_sample_has_its_own_second_chunk():
    config = MemoryConfig(4, 2, 1, anchor="second", frames_per_chunk=3)
    history = memory.empty(config, 2, 2, 2, 1).replace(chunk=jnp.array([1, 0]), anchored=jnp.asarray(True))
    assert anchors(history, config) == [[0, 0], [1, 0], [1, 4], [1, 4]]


def test_training_has_no_second_chunk():
    with pytest.raises(ValueError, match=r"memory\.anchor must be first or null"):
        FlowConfig(memory=MemoryConfig(anchor="second"))


def test_history_keeps_its_shape_under_scan():
    config = MemoryConfig()
    chunks = jnp.stack([chunk(k, 9) for k in range(5)])
    history, _ = jax.lax.scan(lambda h, x: (memory.push(h, x, config), None), memory.empty(config, 2, 2, 2, 1), chunks)
    assert history.latents.shape == (2, 19, 2, 2, 1)
    assert float(history.latents[0, -1, 0, 0, 0]) == 45
    assert int(history.chunk) == 5


def test_sizes_that_cannot_be():
    with pytest.raises(ValueError, match="recent"):
        MemoryConfig(recent=0)
