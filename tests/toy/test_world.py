"""The toy world: scenes follow from seeds, pictures from scenes, and the test captions are held out."""

import itertools
from collections import Counter
from dataclasses import asdict, fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helios_jax.toy import world as toy

seeds = st.integers(0, 2**40)
splits = st.sampled_from(["train", "test"])
NAMES = [field.name for field in fields(toy.Attributes)]


@given(seeds, splits)
@settings(max_examples=50, deadline=None)
def test_a_scene_follows_from_its_seed_and_split(seed, split):
    scene = toy.sample_scene(seed, split)
    assert scene == toy.sample_scene(seed, split)
    assert toy.Attributes(*(getattr(scene, name) for name in NAMES)) in toy.combinations(split)
    np.testing.assert_array_equal(toy.render(scene, 3), toy.render(scene, 3))


def test_about_a_tenth_of_the_captions_is_held_out_and_every_value_is_seen_in_training():
    train, test = toy.combinations("train"), toy.combinations("test")
    assert not set(train) & set(test)
    assert 0.08 < len(test) / (len(train) + len(test)) < 0.13
    for pair in itertools.combinations(NAMES, 2):
        seen = Counter(tuple(getattr(a, name) for name in pair) for a in train)
        every = Counter(tuple(getattr(a, name) for name in pair) for a in train + test)
        assert all(seen[words] > every[words] / 2 for words in every)  # no pair of words is new at test time either
    for name in NAMES:
        assert len({getattr(a, name) for a in test}) == len({getattr(a, name) for a in train})


@given(seeds, splits)
@settings(max_examples=50, deadline=None)
def test_a_caption_names_exactly_its_scene(seed, split):
    scene = toy.sample_scene(seed, split)
    attributes = toy.parse_caption(toy.caption(scene))
    assert asdict(attributes) == {name: getattr(scene, name) for name in NAMES}
    assert toy.colour_name(scene.hue) == scene.colour


def test_captions_read_as_sentences():
    scene = toy.Attributes("red", "plus", "left", "fast", "navy")
    assert toy.caption(scene) == "a red plus moves left fast on a navy background"
    with pytest.raises(ValueError, match="not a caption of the toy world: 'a red dog'"):
        toy.parse_caption("a red dog")
    with pytest.raises(ValueError, match="unknown colour 'beige': choose one of red"):
        toy.Attributes("beige", "plus", "left", "fast", "navy")
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        toy.sample_scene(0, "dev")


@given(seeds, st.sampled_from([(64, 64), (64, 128), (128, 64), (32, 32)]))
@settings(max_examples=50, deadline=None)
def test_the_shape_moves_in_straight_lines_and_stays_in_the_box(seed, size):
    scene = toy.sample_scene(seed, "train", *size)
    centres = toy.positions(scene, 800)
    half = toy.extent(scene.shape, *size) / 2
    assert (centres >= half - 1e-9).all()
    assert (centres <= np.array(size) - half + 1e-9).all()
    np.testing.assert_allclose(centres[0], scene.start)
    # The first movement is the caption's, and lasts for at least 12 frames.
    np.testing.assert_allclose(np.diff(centres[:12], axis=0), np.tile(scene.velocity, (11, 1)), atol=1e-9)
    unit = np.array(scene.velocity) / np.linalg.norm(scene.velocity)
    assert any(np.allclose(unit, direction) for direction in toy.DIRECTIONS[scene.direction])
    # Speed is constant along each axis but in the frames of a bounce, and bounces recur.
    steps = np.abs(np.diff(centres, axis=0))
    np.testing.assert_allclose(np.median(steps, axis=0), np.abs(scene.velocity), atol=1e-9)
    moving = np.abs(scene.velocity) > 0
    assert (np.diff(np.sign(np.diff(centres, axis=0)), axis=0) != 0).sum(0)[moving].min() >= 2


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_a_frame_holds_exactly_the_shape_and_the_background(seed):
    scene = toy.sample_scene(seed, "train")
    frames, centres = toy.render(scene, 5).astype(float), toy.positions(scene, 5)
    background = np.array(toy.BACKGROUNDS[scene.background])
    cover = toy.coverage(scene.shape, centres)
    np.testing.assert_allclose(
        frames, background + cover[..., None] * (scene.foreground - background), atol=0.51, rtol=0
    )
    area = {"square": 18 * 18, "plus": 2 * 24 * 8 - 64, "horizontal bar": 260, "vertical bar": 260}[scene.shape]
    np.testing.assert_allclose(cover.sum((1, 2)), area, rtol=1e-5)
    grid = np.stack(np.mgrid[:64, :64], -1) + 0.5
    centroid = np.einsum("thw,hwp->tp", cover, grid) / area
    np.testing.assert_allclose(centroid, centres, atol=1e-3)


def test_coverage_is_the_limit_of_supersampling():
    centre, fine = np.array([[30.37, 25.81]]), 32
    exact = toy.coverage("plus", centre)
    points = (np.arange(64 * fine) + 0.5) / fine
    y, x = np.abs(points[:, None] - 30.37), np.abs(points[None] - 25.81)
    inside = ((y < 12) & (x < 4)) | ((y < 4) & (x < 12))
    sampled = inside.reshape(64, fine, 64, fine).mean((1, 3))
    np.testing.assert_allclose(exact[0], sampled, atol=0.04)


def test_any_two_values_of_an_attribute_look_different():
    scene = toy.sample_scene(3, "train")
    for colour, background in itertools.product(toy.COLOURS, toy.BACKGROUNDS):
        for hue in toy.COLOURS[colour]:
            assert np.linalg.norm(toy.hue_to_rgb(hue) - toy.BACKGROUNDS[background]) > 100
    for one, other in itertools.combinations(toy.SHAPES, 2):
        a, b = (toy.coverage(shape, np.array([[32.0, 32.0]])).ravel() for shape in (one, other))
        assert np.corrcoef(a, b)[0, 1] < 0.75
    frames = toy.render(replace(scene, height=128, width=192), 2)
    assert frames.shape == (2, 128, 192, 3)
    assert frames.dtype == np.uint8
