"""The toy metrics are near perfect on renderings and fall on whatever is broken, and on nothing else."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from helios_jax.models.vae import AutoencoderKLWan, VAEConfig, normalize
from helios_jax.pretrained import load_model, read_config
from helios_jax.toy import metrics, scenes
from helios_jax.toy import world as toy
from tests.processes import ROOT

FRAMES = 99
SCENES = [toy.sample_scene(seed, split) for seed in range(6) for split in ("train", "test")]
VIDEOS = [toy.render(scene, FRAMES) for scene in SCENES]

PERFECT = {
    "shape": 1, "colour": 1, "background": 1, "contrast": 1, "direction": 1, "speed": 1,
    "colour_error": 0, "background_error": 0, "speed_error": 0, "jump": 0, "chunk_jump": 0, "colour_shift": 0,
    "position_error": 0,
}  # fmt: skip


def another(name, scene):
    """The next word of a table after the scene's."""
    words = list(getattr(toy, f"{name.upper()}S"))
    return words[(words.index(getattr(scene, name)) + 1) % len(words)]


def check(got, **worse):
    """Each metric is perfect but for those named, which are worse than the given value."""
    for name, value in PERFECT.items():
        if name not in worse and name in got:
            assert got[name] == pytest.approx(value, abs=0.02), name
    for name, bound in worse.items():
        assert (got[name] <= bound) if PERFECT.get(name, 1) else (got[name] >= bound), name


@given(st.integers(0, 10**6), st.sampled_from(["train", "test"]), st.integers(34, 140))
@settings(max_examples=25, deadline=None)
def test_renderings_are_perfect_against_scene_and_caption(seed, split, frames):
    scene = toy.sample_scene(seed, split)
    video = toy.render(scene, frames)
    for target in (scene, toy.parse_caption(toy.caption(scene))):
        got = metrics.score(video, target)
        check(got)
        assert got["shape_correlation"] > 0.95
        assert ("position_error" in got) == isinstance(target, toy.Scene)
        assert all(type(value) is float for value in got.values())


def test_the_average_of_renderings_is_perfect_from_start_to_end():
    got = metrics.aggregate(VIDEOS, SCENES)
    check(got)
    assert got["videos"] == len(SCENES)
    for name, value in PERFECT.items():
        for part in ("start", "end"):
            if f"{name}_{part}" in got:
                assert got[f"{name}_{part}"] == pytest.approx(value, abs=0.02)
    with pytest.raises(ValueError, match="no video"):
        metrics.aggregate([], [])
    with pytest.raises(ValueError, match="zip"):
        metrics.aggregate(VIDEOS, SCENES[:1])


def test_noise_scores_zero():
    rng = np.random.default_rng(0)
    got = metrics.aggregate([rng.integers(0, 256, v.shape).astype(np.uint8) for v in VIDEOS], SCENES)
    assert got["shape"] == got["background"] == got["colour"] == got["speed"] == 0
    assert got["direction"] < 0.4
    assert got["shape_correlation"] < 0.2
    assert got["contrast"] < 0.2
    assert min(got["jump"], got["chunk_jump"], got["position_error"]) > 10
    assert min(got["colour_error"], got["background_error"]) > 0.2


def test_an_empty_frame_has_only_its_background():
    empty = [np.broadcast_to(np.uint8(toy.BACKGROUNDS[scene.background]), v.shape) for scene, v in zip(SCENES, VIDEOS)]
    got = metrics.aggregate(empty, SCENES)
    assert got["background"] == 1
    assert got["shape"] == got["colour"] == got["speed"] == got["direction"] == 0
    assert max(got["contrast"], got["shape_correlation"]) < 1e-3


def test_wrong_shape_lowers_only_the_shape_score():
    videos = []
    for scene in SCENES:
        shape = another("shape", scene)
        half = toy.extent(shape) / 2
        start = tuple(np.clip(scene.start, half, 64 - half))
        videos.append(toy.render(replace(scene, shape=shape, start=start), FRAMES))
    check(metrics.aggregate(videos, SCENES), shape=0, shape_correlation=0.8, position_error=0)


def test_wrong_colour_lowers_only_the_colour_score():
    videos = []
    for scene in SCENES:
        colour = another("colour", scene)
        videos.append(toy.render(replace(scene, colour=colour, hue=np.mean(toy.COLOURS[colour])), FRAMES))
    check(metrics.aggregate(videos, SCENES), colour=0, colour_error=0.1, contrast=2)


def test_wrong_background_lowers_only_the_background_score():
    videos = [toy.render(replace(scene, background=another("background", scene)), FRAMES) for scene in SCENES]
    check(metrics.aggregate(videos, SCENES), background=0, background_error=0.15, contrast=2)


def test_frozen_video_lowers_only_the_motion_scores():
    videos = [np.repeat(video[:1], FRAMES, 0) for video in VIDEOS]
    check(metrics.aggregate(videos, SCENES), direction=0, speed=0, speed_error=0.7, position_error=5)


def test_a_reversed_video_moves_the_other_way():
    pairs = [(s, v) for s, v in zip(SCENES, VIDEOS) if s.speed == "slowly" and s.direction != "diagonally"]
    assert len(pairs) >= 3
    # Slow shapes do not bounce in their first chunk, so that its reverse is the opposite movement.
    got = metrics.aggregate([video[32::-1] for _, video in pairs], [scene for scene, _ in pairs])
    check(got, direction=0, position_error=3)


@pytest.mark.parametrize(("factor", "direction"), [(2, 1), (0.5, 1)])
def test_wrong_speed_lowers_only_the_speed_score(factor, direction):
    videos = [toy.render(scene, 2 * FRAMES)[::2] if factor == 2 else np.repeat(v, 2, 0) for scene, v in
              zip(SCENES, VIDEOS)]  # fmt: skip
    got = metrics.aggregate(videos, SCENES)
    extra = {"jump": 0.5, "chunk_jump": 0.5} if factor == 2 else {}
    check(got, speed=0.2, speed_error=0.3, position_error=5, **extra)
    assert got["direction"] == direction


def test_chunks_in_disorder_jump_between_chunks():
    videos = [np.concatenate([video[66:], video[33:66], video[:33]]) for video in VIDEOS]
    got = metrics.aggregate(videos, SCENES)
    assert got["chunk_jump"] > 5
    assert got["chunk_jump"] > 10 * got["jump"]
    assert got["shape"] == got["speed"] == 1


def test_latents_that_go_on_as_within_chunks_have_no_border():
    """Of a straight path whose chunks' first latents are off the others, as a video encoder's are."""
    path = np.arange(27, dtype=np.float32).reshape(3, 9, 1, 1, 1) * np.ones((4, 5, 2), np.float32)
    path[:, 0] += 0.5
    assert metrics.latent_border_ratio(path) == pytest.approx(3)  # (1 + .5) / (1 - .5)
    path[:, 0] -= 0.5
    assert metrics.latent_border_ratio(path) == pytest.approx(1)
    assert metrics.latent_border_ratio(path[[0, 2]]) == pytest.approx(10)
    assert metrics.latent_border_ratio(path[:1]) == 1


def test_renderings_have_no_border_in_latents_and_chunks_in_disorder_do():
    """As the embedded autoencoder encodes them, chunk by chunk."""
    folder = ROOT / "helios_jax" / "assets" / "toy" / "vae"
    config = read_config(folder, VAEConfig)
    vae = load_model(jax.eval_shape(lambda: AutoencoderKLWan(config, rngs=nnx.Rngs(0))), folder)
    encode = jax.jit(lambda vae, x: normalize(vae.encode(x)[0], config))
    found = {False: [], True: []}
    for video in VIDEOS[:4]:
        chunks = video.reshape(3, 33, *video.shape[1:]).astype(np.float32) / 127.5 - 1
        latents = np.asarray(encode(vae, jnp.asarray(chunks)))
        for disorder in found:
            found[disorder].append(metrics.latent_border_ratio(latents[::-1] if disorder else latents))
    assert found[False] == pytest.approx(np.ones(4), abs=0.3)
    assert np.mean(found[True]) > 1.3


def test_a_chunk_that_is_shown_again_is_repeated_motion():
    def repeated(frames):
        return [metrics.rollout(video[frames], scene, 16)[0]["repeated"] for scene, video in zip(SCENES, VIDEOS)]

    assert set(repeated(np.arange(FRAMES))) == {0.0}
    assert set(repeated(np.arange(FRAMES) % 33)) == {1.0}
    assert set(repeated(np.r_[0:66, 0:33])) == {0.5}
    assert set(repeated(np.zeros(FRAMES, int))) == {0.0}  # a shape that stays where it is
    # However long a shape bounces, no chunk is one of the two before; of 33 frames, or 32 where chunks overlap.
    for seed in range(200):
        for scene in (toy.sample_scene(seed, "train"), *scenes.sample_scene(seed, "train").shapes):
            path = toy.positions(scene, 33 * 20) * toy.NOMINAL_SIZE / scene.height
            assert metrics.repeated(path) == metrics.repeated(path, metrics.ChunkFrames(33, 32)) == 0


def test_drift_is_the_difference_of_end_and_start():
    def drift(video, scene, gain):
        grey = np.float32(110)
        frames = grey + (video - grey) * np.linspace(1, gain, len(video))[:, None, None, None]
        return np.clip(frames, 0, 255).astype(np.uint8)

    for gain in (0.3, 2.0):
        got = metrics.aggregate([drift(v, s, gain) for s, v in zip(SCENES, VIDEOS)], SCENES)
        assert got["colour_error_end"] > 3 * got["colour_error_start"]
        assert got["colour_shift"] > 0.05
        assert got["shape_start"] == got["shape_end"] == 1
    assert got["contrast_end"] > got["contrast_start"]


def test_a_turning_hue_loses_its_name():
    hues = []
    for scene in SCENES:
        frames = [toy.render(replace(scene, hue=scene.hue + 2 * i), i + 1)[i] for i in range(24)]
        hues.append(metrics.score(np.stack(frames), toy.parse_caption(toy.caption(scene))))
    assert np.mean([row["colour"] for row in hues]) < 0.9
    assert np.mean([row["colour_shift"] for row in hues]) > 0.1


def test_mild_damage_as_of_an_autoencoder_is_forgiven():
    rng = np.random.default_rng(0)
    for scene, video in zip(SCENES[:5], VIDEOS[:5]):
        noisy = np.clip(video + rng.normal(0, 15, video.shape), 0, 255).astype(np.uint8)
        smooth = sum(np.roll(video.astype(float), (i, j), (1, 2)) for i in (-1, 0, 1) for j in (-1, 0, 1)) / 9
        stepped = np.concatenate([video[:1], np.repeat(video[1::4], 4, 0)])[:FRAMES]  # one picture every four frames
        for broken in (noisy, smooth.astype(np.uint8), stepped):
            got = metrics.score(broken, scene)
            for name in ("shape", "colour", "background", "speed", "direction"):
                assert got[name] == 1, name
            assert got["contrast"] > 0.8


@pytest.mark.parametrize("size", [(128, 128), (64, 128), (96, 64)])
def test_other_sizes_are_measured_in_the_same_pixels(size):
    for seed in range(4):
        scene = toy.sample_scene(seed, "train", *size)
        check(metrics.score(toy.render(scene, 66), scene))


@pytest.mark.parametrize("video", [VIDEOS[0][:1], VIDEOS[0][..., :1], VIDEOS[0].astype(float), VIDEOS[0][0]])
def test_array_that_is_not_a_video_is_refused(video):
    with pytest.raises(ValueError, match=r"a video is uint8 \[t >= 2, h, w, 3\], got"):
        metrics.score(video, SCENES[0])
