"""One table says how the past is compressed: counts, tokens, patches and positions follow from it."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from helios_jax.diffusion import memory
from helios_jax.diffusion.memory import MemoryConfig
from helios_jax.models.transformer import (
    MEMORY_PATCHES,
    SCALES,
    FrameIndices,
    HistoryLatents,
    Transformer,
    init_memory_patches,
)
from helios_jax.models.transformer.history import num_tokens
from tests import tiny

PATCH = (1, 2, 2)


def test_the_released_window():
    assert MEMORY_PATCHES == {"patch_short": (1, 1, 1), "patch_mid": (2, 2, 2), "patch_long": (4, 4, 4)}
    # 384 x 640: anchor and last frame in full, two frames as one, sixteen as four.
    assert MemoryConfig().num_tokens(48, 80, PATCH) == 2 * 24 * 40 + 12 * 20 + 4 * 6 * 10
    assert MemoryConfig(anchor=None, mid=0).num_tokens(48, 80, PATCH) == 24 * 40 + 4 * 6 * 10


def test_each_part_of_the_table_has_its_place():
    assert [f.name for f in dataclasses.fields(HistoryLatents)] == list(SCALES)
    assert [f.name for f in dataclasses.fields(FrameIndices)] == ["noisy", *SCALES]
    assert list(MemoryConfig().parts) == list(reversed(SCALES))


@pytest.mark.parametrize("scale", [None, (1, 2, 2), (8, 4, 2)], ids=str)
def test_all_follows_from_the_table(scale, monkeypatch):
    if scale is not None:  # another compression of the far past
        monkeypatch.setitem(SCALES, "long", scale)
        monkeypatch.setitem(MEMORY_PATCHES, "patch_long", scale)
    config, window = tiny.TRANSFORMER, MemoryConfig(long=5, mid=2, recent=1, frames_per_chunk=3)
    height, width = 6, 10
    model = init_memory_patches(tiny.draw(Transformer.abstract(config), np.random.default_rng(0)))
    history = memory.empty(window, 1, height, width, config.in_channels)
    history = memory.push(history, jnp.ones((1, 9, height, width, config.in_channels)), window)
    parts, indices = memory.window(window, history)
    latents = jnp.ones((1, 3, height, width, config.in_channels))
    tokens, (cos, _), packing = model._tokens((latents,), parts, indices)
    expected = window.num_tokens(height, width, config.patch_size)
    assert expected == num_tokens({"short": 2, "mid": 2, "long": 5}, height, width, config.patch_size)
    assert packing.history == expected
    assert tokens.shape[1] == cos.shape[1] == expected + 3 * 3 * 5
    # Constant latents look alike through patches of any size that begin as the patch embedding.
    np.testing.assert_allclose(tokens, jnp.broadcast_to(tokens[:, -1:], tokens.shape), rtol=1e-4, atol=1e-5)
