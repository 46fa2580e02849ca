"""Dropping and corrupting the history: probabilities, what is kept, zeros stay zeros."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helios_jax.diffusion.corruption import CorruptionConfig, DropConfig, corrupt_history, drop_history
from helios_jax.diffusion.memory import MemoryConfig

MEMORY = MemoryConfig()
SAMPLES = 4000


def dropped(config: DropConfig):
    """How many of the 19 history frames each sample lost, and whether it lost its anchor."""
    history, anchor = jnp.ones((SAMPLES, 19, 1, 1, 1)), jnp.ones((SAMPLES, 1, 1, 1, 1))
    history, anchor = drop_history(jax.random.key(0), history, anchor, config, MEMORY)
    kept = np.asarray(history[:, :, 0, 0, 0])
    assert (np.diff(kept, axis=1) >= 0).all()  # the oldest go first
    return 19 - kept.sum(1), np.asarray(anchor[:, 0, 0, 0, 0]) == 0


def test_text_to_video_drops_everything():
    lost, anchor = dropped(DropConfig(t2v=0.4, v2v=0.0))
    assert set(lost) == {0, 19}
    np.testing.assert_array_equal(lost == 19, anchor)
    assert abs(anchor.mean() - 0.4) < 0.03


def test_video_to_video_keeps_whole_chunks():
    lost, anchor = dropped(DropConfig(t2v=0.0, v2v=0.5))
    assert set(lost) == {0, 1, 10, 19}
    assert not anchor.any()
    for count in (1, 10, 19):
        assert abs((lost == count).mean() - 0.5 / 3) < 0.03


def test_image_to_video_keeps_the_last_frame():
    lost, anchor = dropped(DropConfig(t2v=0.0, i2v=0.3, v2v=0.0))
    assert set(lost) == {0, 18}
    assert abs((lost == 18).mean() - 0.3) < 0.03
    assert not anchor.any()


def test_noise_is_drawn_for_every_frame_and_zeros_stay():
    frames = jnp.ones((SAMPLES, 20, 2, 2, 4)).at[:, 3].set(0)
    history, anchor = corrupt_history(jax.random.key(1), frames[:, 1:], frames[:, :1], CorruptionConfig(0.5, 0.2))
    out = np.asarray(jnp.concatenate([anchor, history], 1))
    assert not out[:, 3].any()
    clean = (out == np.asarray(frames)).all((1, 2, 3, 4))
    assert abs(clean.mean() - 0.2) < 0.03
    strength = 1 - out[~clean].mean((2, 3, 4))  # 1 - sigma remains of a frame of ones, and noise of mean zero
    strength = np.delete(strength, 3, 1)
    assert abs(strength.mean() - 0.25) < 0.02
    correlation = np.corrcoef(strength[:, 0], strength[:, 1])[0, 1]
    assert abs(correlation) < 0.1


@pytest.mark.parametrize("make", [lambda: DropConfig(t2v=1.5), lambda: CorruptionConfig(noise=-0.1)])
def test_probabilities_out_of_range(make):
    with pytest.raises(ValueError, match="between 0 and 1"):
        make()
