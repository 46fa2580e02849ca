"""Dropping and corrupting the history: probabilities, what is kept, zeros stay zeros."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helios_jax.diffusion.corruption import (
    BlurConfig,
    CorruptionConfig,
    DropConfig,
    SaturationConfig,
    corrupt_history,
    drop_history,
    sections,
)
from helios_jax.diffusion.memory import MemoryConfig
from tests.closeness import assert_close

MEMORY = MemoryConfig()
SAMPLES = 4000
NOISE = CorruptionConfig(noise=0.5, clean=0.2, blur=None, saturation=None)


def keys(seed: int, count: int = SAMPLES):
    return jax.random.split(jax.random.key(seed), count)


def dropped(config: DropConfig):
    """How many of the 19 history frames each sample lost, and whether it lost its anchor."""
    history, anchor = jnp.ones((SAMPLES, 19, 1, 1, 1)), jnp.ones((SAMPLES, 1, 1, 1, 1))
    history, anchor = jax.jit(lambda *x: drop_history(*x, config, MEMORY))(keys(0), history, anchor)
    kept = np.asarray(history[:, :, 0, 0, 0])
    assert (np.diff(kept, axis=1) >= 0).all()  # the oldest go first
    return 19 - kept.sum(1), np.asarray(anchor[:, 0, 0, 0, 0]) == 0


def corrupted(frames, config: CorruptionConfig, seed: int = 1):
    """`frames` [b, 20, h, w, c] after corruption, the anchor first."""
    corrupt = jax.jit(lambda keys, x: corrupt_history(keys, x[:, 1:], x[:, :1], config, MEMORY))
    history, anchor = corrupt(keys(seed, len(frames)), frames)
    return np.concatenate([anchor, history], 1)


def test_text_to_video_drops_everything():
    lost, anchor = dropped(DropConfig(t2v=0.4, i2v=0.0, v2v=0.0))
    assert set(lost) == {0, 19}
    np.testing.assert_array_equal(lost == 19, anchor)
    assert abs(anchor.mean() - 0.4) < 0.03


def test_video_to_video_keeps_whole_chunks():
    lost, anchor = dropped(DropConfig(t2v=0.0, i2v=0.0, v2v=0.5))
    assert set(lost) == {0, 1, 10, 19}
    assert not anchor.any()
    for count in (1, 10, 19):
        assert abs((lost == count).mean() - 0.5 / 3) < 0.03


def test_image_to_video_keeps_the_last_frame_and_the_anchor():
    lost, anchor = dropped(DropConfig(t2v=0.0, i2v=0.3, v2v=0.0))
    assert set(lost) == {0, 18}
    assert abs((lost == 18).mean() - 0.3) < 0.03
    assert not anchor.any()


def test_the_last_task_is_tried_when_those_before_were_not_chosen():
    lost, anchor = dropped(DropConfig(t2v=0.5, i2v=0.5, v2v=1.0))
    assert abs(anchor.mean() - 0.5) < 0.03
    assert abs((lost == 18).mean() - 0.25) < 0.03
    assert abs((lost == 10).mean() - 0.25 / 3) < 0.03


def test_sections_are_chunks_from_the_end_and_the_last_in_two():
    assert sections(MEMORY) == (0, *[1] * 9, *[2] * 2, *[3] * 7)
    assert sections(MemoryConfig(long=2, mid=1, recent=1)) == (0,) * 4  # less than a chunk


def test_a_sample_depends_on_its_key_alone():
    frames = jnp.asarray(np.random.default_rng(0).standard_normal((6, 20, 4, 4, 2), np.float32))
    config, own = CorruptionConfig(), keys(3, 6)
    corrupt = jax.jit(lambda keys, x: corrupt_history(keys, x[:, 1:], x[:, :1], config, MEMORY))
    for a, b in zip(corrupt(own, frames), corrupt(own[4:5], frames[4:5])):
        assert_close(a[4:5], b)


def test_noise_is_drawn_for_every_frame_and_zeros_stay():
    frames = jnp.ones((SAMPLES, 20, 2, 2, 4)).at[:, 3].set(0)
    out = corrupted(frames, NOISE)
    assert not out[:, 3].any()
    clean = (out == np.asarray(frames)).all((1, 2, 3, 4))
    assert abs(clean.mean() - 0.2) < 0.03
    strength = 1 - out[~clean].mean((2, 3, 4))  # 1 - sigma remains of a frame of ones, and noise of mean zero
    strength = np.delete(strength, 3, 1)
    assert abs(strength.mean() - 0.25) < 0.02
    assert abs(np.corrcoef(strength[:, 4], strength[:, 5])[0, 1]) < 0.1


def test_noise_of_a_section_has_one_strength():
    config = CorruptionConfig(noise=0.5, per="section", clean=0.0, blur=None, saturation=None)
    out = corrupted(jnp.ones((300, 20, 8, 8, 16)), config)
    strength = np.corrcoef(1 - out.mean((2, 3, 4)), rowvar=False)
    number = np.array([-1, *sections(MEMORY)])
    same = number[:, None] == number
    assert strength[same].min() > 0.9
    assert np.abs(strength[~same]).max() < 0.3


def test_a_blurred_sample_has_no_noise():
    frames = jnp.ones((SAMPLES, 20, 3, 3, 2))  # what is even stays as it is when it is blurred
    out = corrupted(frames, CorruptionConfig(clean=0.0, blur=BlurConfig(probability=0.3), saturation=None))
    still = np.abs(out - 1).max((1, 2, 3, 4)) < 1e-5
    assert abs(still.mean() - 0.3) < 0.03


def test_blur_shrinks_by_its_ratio():
    """Stripes one wide fade more the smaller the ratio, and a ratio of one changes nothing."""
    stripes = jnp.broadcast_to(jnp.asarray([1.0, -1.0] * 8)[:, None, None], (200, 20, 16, 16, 1))
    for ratio, low, high in ((1.0, 1.0, 1.0), (0.5, 0.0, 0.2)):
        blur = BlurConfig(probability=1.0, smallest=ratio, largest=ratio)
        out = corrupted(stripes, CorruptionConfig(clean=0.0, blur=blur, saturation=None))
        assert low - 1e-5 <= np.abs(out).mean() <= high + 1e-5


def test_saturation_keeps_means_and_the_anchor_and_is_one_factor_a_section():
    frames = jnp.asarray(np.random.default_rng(0).standard_normal((SAMPLES, 20, 1, 1, 3), np.float32))
    frames = frames.at[:, 7].set(0)
    config = CorruptionConfig(clean=1.0, saturation=SaturationConfig(smallest=0.5, largest=2.0, clean=0.2))
    out, frames = corrupted(frames, config), np.asarray(frames)
    assert_close(out.mean(-1), frames.mean(-1))
    np.testing.assert_array_equal(out[:, 0], frames[:, 0])
    assert not out[:, 7].any()
    factor = np.delete((out.std(-1) / np.maximum(frames.std(-1), 1e-9))[:, :, 0, 0], [0, 7], 1)
    number = np.delete(np.array(sections(MEMORY)), 6)
    for section in range(4):
        np.testing.assert_allclose(factor[:, number == section].std(1), 0, atol=1e-2)
    one = factor[:, -1]
    assert abs((np.abs(one - 1) < 1e-4).mean() - 0.2) < 0.03
    assert abs((one < 1 - 1e-4).mean() - 0.4) < 0.03
    assert one.min() >= 0.5 - 1e-3
    assert one.max() <= 2 + 1e-3
    assert abs(np.corrcoef(factor[:, 0], one)[0, 1]) < 0.1


@pytest.mark.parametrize(
    "make",
    [
        lambda: DropConfig(t2v=1.5),
        lambda: CorruptionConfig(noise=-0.1),
        lambda: CorruptionConfig(clean=2),
        lambda: BlurConfig(probability=-1),
        lambda: BlurConfig(smallest=0),
        lambda: BlurConfig(smallest=0.9, largest=0.8),
        lambda: SaturationConfig(clean=1.1),
        lambda: SaturationConfig(largest=1.0),
    ],
)
def test_values_out_of_range(make):
    with pytest.raises(ValueError, match=r"between 0 and|below 1 and largest above"):
        make()
