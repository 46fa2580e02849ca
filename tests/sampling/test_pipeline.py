"""Laws of the sampler, on a tiny pipeline."""

import jax
import numpy as np
import pytest

from helios_jax.sampling.arguments import make_prompts
from helios_jax.sampling.noise import SeededNoise
from tests import tiny
from tests.closeness import assert_close

SMALL = {"height": 32, "width": 48, "num_inference_steps": 3, "num_latent_frames_per_chunk": 3}
WINDOW = 9  # frames of a chunk of 3 latents


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline()


def stream(pipe, num_frames: int, progress=None, **options):
    settings = {**SMALL, "num_frames": num_frames, "guidance_scale": 3.0, "seed": 5, **options}
    return list(pipe.stream("a red plus", "a bar", progress=progress, **settings))


def call(pipe, num_frames: int, **options):
    options = {"negative_prompt": "a bar", "guidance_scale": 3.0, "seed": 5, **options}
    return pipe("a red plus", num_frames=num_frames, **SMALL, **options).frames


def test_stream_and_call_give_the_same_frames(pipe):
    whole = call(pipe, 2 * WINDOW + 4)
    parts = stream(pipe, 2 * WINDOW + 4)
    assert [p.shape[1] for p in parts] == [WINDOW, WINDOW, 4]
    assert all(p.dtype == np.uint8 for p in parts)
    np.testing.assert_allclose(np.concatenate(parts, 1) / 255, whole, atol=0.51 / 255)


def test_a_later_chunk_never_changes_an_earlier_one(pipe):
    short, long = (call(pipe, n * WINDOW, output_type="latent") for n in (1, 3))
    assert_close(long[:, :3], short)
    assert long.shape == (1, 9, 4, 6, 4)


def test_exactly_the_frames_asked_for(pipe):
    for num_frames in (1, WINDOW, WINDOW + 1):
        video = call(pipe, num_frames)
        assert video.shape == (1, num_frames, 32, 48, 3)
        assert video.min() >= 0
        assert video.max() <= 1


def test_seeds_and_prompts_decide_and_samples_do_not_mix(pipe):
    one = call(pipe, 1, output_type="latent")
    np.testing.assert_array_equal(call(pipe, 1, output_type="latent"), one)
    assert np.abs(call(pipe, 1, seed=6, output_type="latent") - one).max() > 0.1
    shape = (1, 3, 4, 6, 4)
    noise = [np.asarray(SeededNoise(i).normal("latents", shape)) for i in range(2)]

    class Fixed:
        def __init__(self, *values):
            self.value = np.concatenate(values)

        def normal(self, site, shape):
            return self.value

        uniform = normal

    def sample(prompts, *noise):
        options = {"guidance_scale": 3.0, "output_type": "latent", "noise": Fixed(*noise)}
        return pipe(prompts, num_frames=1, **SMALL, **options).frames

    both = sample(["a red plus", "a blue bar"], *noise)
    for i, prompt in enumerate(["a red plus", "a blue bar"]):
        assert_close(both[i : i + 1], sample(prompt, noise[i]))
    assert np.abs(sample("a blue bar", noise[0]) - both[:1]).max() > 1e-3


def test_progress_counts_every_step(pipe):
    seen = []
    stream(pipe, 2 * WINDOW, lambda chunk, step: seen.append((chunk, step)))
    assert seen == [(c, s) for c in range(2) for s in range(3)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"height": 40}, ["height", "16", "32 and 48"]),
        ({"width": 8}, ["width", "16"]),
        ({"num_frames": 0}, ["num_frames"]),
        ({"num_inference_steps": 0}, ["num_inference_steps"]),
        ({"history_sizes": (16, 2)}, ["history_sizes", "three"]),
        ({"history_sizes": (16, 2, 0)}, ["recent"]),
        ({"max_sequence_length": 0}, ["max_sequence_length"]),
        ({"output_type": "pil"}, ["output_type", "latent"]),
        ({"negative_prompt": ["a", "b"]}, ["2 negative prompts", "1 prompts"]),
    ],
)
def test_bad_arguments_are_named(pipe, options, words):
    with pytest.raises(ValueError) as error:
        pipe("a red plus", **{**SMALL, "num_frames": 9, **options})
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_noise_of_a_wrong_shape_is_refused(pipe):
    class Wrong:
        def normal(self, site, shape):
            return np.zeros(shape[1:], np.float32)

        uniform = normal

    with pytest.raises(ValueError, match="latents"):
        pipe("a red plus", num_frames=9, noise=Wrong(), **SMALL)


def test_seeded_noise_depends_on_site_and_count():
    noise = SeededNoise(3)
    first, second, other = (np.asarray(noise.normal(site, (4,))) for site in ("a", "a", "b"))
    assert len({x.tobytes() for x in (first, second, other)}) == 3
    np.testing.assert_array_equal(SeededNoise(3).normal("a", (4,)), first)
    assert isinstance(noise.uniform("a", (2,)), jax.Array)


def test_a_stream_leaves_the_caller_s_noise_as_it_was(pipe):
    value = jax.random.normal(jax.random.key(0), (1, 3, 4, 6, 4))

    class Fixed:
        def normal(self, site, shape):
            return value

        uniform = normal

    for _ in range(2):  # a step's state is overwritten; the noise that it began with must not be
        stream(pipe, WINDOW, noise=Fixed())
    assert not value.is_deleted()


@pytest.mark.parametrize("prompt", [None, [], [None], 3])
def test_what_is_no_prompt_is_refused(prompt):
    with pytest.raises(ValueError, match=r"^prompt must be a string or a list of at least one, got "):
        make_prompts(prompt)


def test_one_prompt_is_encoded_as_a_list_of_one(pipe):
    np.testing.assert_array_equal(pipe.encode_prompt("a bar"), pipe.encode_prompt(["a bar"]))
