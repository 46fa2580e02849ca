"""The larger toy world and its metrics: near perfect on renderings, and each fault falls in the metric that sees it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from helios_jax.models.vae import AutoencoderKLWan, VAEConfig
from helios_jax.pretrained import load_model, read_config
from helios_jax.toy import scene_metrics, scenes, world
from helios_jax.toy.world import Attributes
from tests.processes import ROOT

FRAMES = 99
SHAPES = (
    world.Scene("red", "square", "right", "fast", "grey", 0.0, (40.0, 30.0), (0.0, 3.0), 128, 128, scenes.SIZE),
    world.Scene("blue", "plus", "up", "slowly", "grey", 222.0, (100.0, 90.0), (-1.2, 0.0), 128, 128, scenes.SIZE),
)
SCENE = scenes.Scene(SHAPES, scenes.Background("dark", "striped", "left"), (3.0, 5.0))
CAPTION = "a red square moves right fast and a blue plus moves up slowly on a dark striped background that pans left"
PERFECT = {"present": 1, "shape": 1, "direction": 1, "speed": 1, "background": 1, "texture": 1, "texture_contrast": 1}
PERFECT |= {"colour_error": 0, "speed_error": 0, "stuck": 0, "repeated": 0, "jump": 0, "chunk_jump": 0, "pan_error": 0}


def scores(video: np.ndarray, caption: str = CAPTION) -> dict[str, float]:
    return scene_metrics.rollout(video, caption, fps=16)[0]


@pytest.fixture(scope="module")
def video():
    made = scenes.render(SCENE, FRAMES)
    made.flags.writeable = False
    return made


def test_captions_say_all_and_are_read_back():
    assert scenes.caption(SCENE) == CAPTION
    shapes, background = scenes.parse_caption(CAPTION)
    assert shapes == tuple(Attributes(s.colour, s.shape, s.direction, s.speed, "grey") for s in SHAPES)
    assert background == SCENE.background
    for seed in range(200):
        scene = scenes.sample_scene(seed, "train")
        assert scenes.parse_caption(scenes.caption(scene))[1] == scene.background
        assert len({shape.colour for shape in scene.shapes}) == len(scene.shapes)
    for wrong in ("", "a red square", CAPTION.replace("striped", "spotted"), CAPTION.replace(" and ", " or ")):
        with pytest.raises(ValueError, match="not a caption of the larger toy world"):
            scenes.parse_caption(wrong)


def test_words_of_shapes_are_held_out_and_every_word_is_in_both_splits():
    train, test = scenes.movers("train"), scenes.movers("test")
    assert not {*train} & {*test}
    assert 0.07 < len(test) / len(train + test) < 0.15
    for words in (train, test):
        for name, known in (("colour", world.COLOURS), ("shape", world.SHAPES), ("direction", world.DIRECTIONS)):
            assert {getattr(one, name) for one in words} == set(known)


def test_a_scene_follows_from_its_seed():
    one, same, other = (scenes.sample_scene(seed, "train") for seed in (5, 5, 6))
    assert one == same != other
    np.testing.assert_array_equal(scenes.render(one, 4), scenes.render(same, 9)[:4])


def test_the_texture_moves_with_the_pan_and_the_front_shape_hides_the_other():
    ground = scenes.texture(SCENE, 33)
    np.testing.assert_allclose(ground[32], ground[0], atol=1e-3)  # a period of 32 pixels at one pixel a frame
    np.testing.assert_allclose(ground[1][:, :-1], ground[0][:, 1:], atol=1e-3)
    same = dataclasses.replace(SHAPES[1], start=(40.0, 30.0))
    frame = scenes.render(dataclasses.replace(SCENE, shapes=(SHAPES[0], same)), 1)[0]
    assert frame[40, 30].argmax() == 2
    assert scenes.render(dataclasses.replace(SCENE, shapes=(same, SHAPES[0])), 1)[0][40, 30].argmax() == 0


def test_renderings_are_near_perfect(video):
    found = scores(video)
    for name, value in PERFECT.items():
        assert found[name] == pytest.approx(value, abs=0.03), name
    assert found["border_ratio"] == pytest.approx(1, abs=0.1)
    for seed in range(4):
        scene = scenes.sample_scene(seed, "test")
        found = scores(scenes.render(scene, 66), scenes.caption(scene))
        for name, value in PERFECT.items():
            assert found[name] == pytest.approx(value, abs=0.07), (seed, name)


def jumping(video):
    moved = dataclasses.replace(SCENE, shapes=(SHAPES[0], dataclasses.replace(SHAPES[1], start=(100.0, 20.0))))
    return np.concatenate([video[:33], scenes.render(moved, FRAMES)[33:]])


def of(**background):
    words = dataclasses.replace(SCENE.background, **background)
    return lambda _: scenes.render(dataclasses.replace(SCENE, background=words), FRAMES)


def fading(video):
    grey = video.mean(-1, keepdims=True)
    share = np.linspace(0, 1, FRAMES)[:, None, None, None]
    return (video * (1 - share) + grey * share).astype(np.uint8)


BROKEN = {
    "frozen": (lambda v: np.repeat(v[:1], FRAMES, 0), {"stuck": 0.9, "direction": -0.9, "pan_error": 0.4}),
    "no shapes": (lambda v: scenes.render(dataclasses.replace(SCENE, shapes=()), FRAMES), {"present": -0.9}),
    "other colours": (lambda v: v[..., ::-1].copy(), {"shape": -0.9, "direction": -0.9, "speed": -0.9}),
    "slower": (lambda v: np.repeat(v, 3, 0)[:FRAMES], {"speed_error": 0.5, "speed": -0.9, "pan_error": 0.2}),
    "backwards": (lambda v: v[::-1].copy(), {"pan_error": 0.8}),
    "one chunk again and again": (lambda v: v[np.arange(FRAMES) % 33], {"repeated": 0.9}),
    "a jump at a border": (jumping, {"chunk_jump": 2.0, "border_ratio": 0.2}),
    "another brightness": (of(brightness="grey"), {"background": -0.9}),
    "another texture": (of(texture="barred", pan="up"), {"texture": -0.9, "texture_contrast": -0.9}),
    "another pan": (of(pan="right"), {"pan_error": 0.8}),
    "no pan": (of(pan=None), {"pan_error": 0.4}),
    "fading": (fading, {"colour_error_drift": 0.3, "present_drift": 0.5}),
    "darker": (lambda v: (v * 0.6).astype(np.uint8), {"colour_error": 0.15}),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
def test_each_fault_falls_in_the_metric_that_sees_it(video, fault):
    broken, changes = BROKEN[fault]
    before, after = scores(video), scores(broken(video))
    for name, least in changes.items():
        change = after[name] - before[name]
        assert change * np.sign(least) > abs(least), (name, before[name], after[name])


def test_the_course_has_a_value_for_each_second(video):
    _, course = scene_metrics.rollout(fading(video), CAPTION, fps=16)
    assert {len(values) for values in course.values()} == {FRAMES // 16}
    assert course["colour_error"][0] < 0.1 < course["colour_error"][-1]
    assert course["texture_contrast"][-1] == pytest.approx(1, abs=0.1)


def test_the_embedded_autoencoder_shows_what_it_is_given(video):
    """A frame, which the first latent stands for; and its config has the statistics of such latents."""
    folder = ROOT / "helios_jax" / "assets" / "scenes" / "vae"
    config = read_config(folder, VAEConfig)
    vae = load_model(jax.eval_shape(lambda: AutoencoderKLWan(config, rngs=nnx.Rngs(0))), folder)
    frame = jnp.asarray(video[None, :1], jnp.float32) / 127.5 - 1
    latents, shown = jax.jit(lambda vae: (z := vae.encode(frame)[0], vae.decode(z)))(vae)
    assert -10 * np.log10(np.square(np.clip(shown, -1, 1) - frame).mean() / 4) > 30
    scaled = (latents - np.array(config.latents_mean)) / np.array(config.latents_std)
    assert np.abs(scaled.mean()) < 0.3
    assert 0.7 < scaled.std() < 1.4
