"""Chunks that overlap: each begins with the last frame of the one before, which the video shows once."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from helios_jax.diffusion.schedule import DMDSchedulerConfig, SchedulerConfig
from helios_jax.sampling.chunk_frames import ChunkFrames
from helios_jax.sampling.frames import decode, encode_last_frame
from helios_jax.sampling.options import PromptSwitch
from helios_jax.sampling.plan import Variant
from tests import tiny
from tests.closeness import BYTES
from tests.sampling.test_stream import SMALL, STEPS, WINDOW
from tests.tiny_run import run

VIDEO = np.random.default_rng(0).integers(0, 255, (WINDOW, 32, 48, 3), np.uint8)
ARGUMENTS = {**SMALL, **STEPS, "seed": 3, "overlap_chunks": True}


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline()


def chunks(pipe, frames, **options):
    return [
        np.asarray(part) for part in pipe.stream("a red plus", "a bar", num_frames=frames, **{**ARGUMENTS, **options})
    ]


def after(pipe, latents):
    """The latent frame that the chunk after one begins with."""
    return np.asarray(encode_last_frame(pipe.vae, decode(pipe.vae, jnp.asarray(latents), dtype="uint8")))


@pytest.mark.parametrize(("first", "later"), [(33, 33), (33, 32), (5, 4)])
def test_frames_of_chunks(first, later):
    frames = ChunkFrames(first, later)
    shown = [chunk for chunk in range(7) for _ in range(frames.of(chunk))]
    assert [frames.chunk(frame) for frame in range(len(shown))] == shown
    assert [frames.before(chunk) for chunk in range(7)] == [shown.index(chunk) for chunk in range(7)]
    assert [frames.chunks(count) for count in range(1, len(shown) + 1)] == [chunk + 1 for chunk in shown]
    changes = np.diff(shown)
    assert changes[frames.borders].all()
    assert changes.sum() == changes[frames.borders].sum() == 6


def test_a_chunk_begins_with_the_last_frame_before_it(pipe):
    free = chunks(pipe, 3 * WINDOW, output_type="latent", overlap_chunks=False)
    held = chunks(pipe, 3 * WINDOW - 2, output_type="latent")
    assert len(held) == 3
    np.testing.assert_array_equal(held[0], free[0])
    for before, chunk in itertools.pairwise(held):
        np.testing.assert_allclose(chunk[:, :1], after(pipe, before), atol=BYTES)
    assert np.abs(free[1][:, :1] - after(pipe, free[0])).max() > 0.1


def test_a_video_begins_with_the_image_or_the_last_frame_that_it_is_given(pipe, tmp_path):
    for options, frame in (({"image": VIDEO[0]}, VIDEO[0]), ({"video": VIDEO}, VIDEO[-1])):
        given = encode_last_frame(pipe.vae, jnp.asarray(frame)[None, None])
        (chunk,) = chunks(pipe, WINDOW, output_type="latent", **options)
        np.testing.assert_allclose(chunk[:, :1], given, atol=1e-4)
    stream = pipe.stream("a red plus", num_frames=WINDOW, image=VIDEO[0], **ARGUMENTS)
    with pytest.raises(ValueError, match="saved after that chunk"):
        stream.save_state(tmp_path / "state")


def test_the_video_shows_the_frame_once(pipe):
    latents, parts = chunks(pipe, 23, output_type="latent"), chunks(pipe, 23)
    assert [part.shape[1] for part in parts] == [9, 8, 6]
    for i, part in enumerate(parts):
        whole = np.asarray(decode(pipe.vae, jnp.asarray(latents[i]), dtype="uint8"))
        np.testing.assert_allclose(part.astype(int), whole[:, min(i, 1) :][:, : part.shape[1]], atol=1)


def test_the_one_program_makes_the_same_video(pipe):
    for options in ({}, {"video": VIDEO}, {"image": VIDEO[0]}):
        whole = pipe("a red plus", "a bar", num_frames=23, **ARGUMENTS, **options).frames
        np.testing.assert_allclose(np.concatenate(chunks(pipe, 23, **options), 1) / 255, whole, atol=0.6 / 255)


@pytest.mark.parametrize("distilled", [pytest.param(False, marks=pytest.mark.heavy), True])
def test_levels_of_a_pyramid(pipe, distilled):
    """Of Mid, and of Distilled with another first chunk."""
    variant = Variant(pyramid=True, is_cfg_zero_star=not distilled, is_distilled=distilled, trained_size=(64, 64))
    scheduler = DMDSchedulerConfig() if distilled else SchedulerConfig()
    pyramid = dataclasses.replace(pipe, variant=variant, scheduler=scheduler)
    options = {"height": 64, "width": 64, "overlap_chunks": True, "output_type": "latent", "num_frames": 17}
    options |= {"num_latent_frames_per_chunk": 3, "pyramid_num_inference_steps_list": [1, 1, 2]}
    options |= {"is_amplify_first_chunk": True} if distilled else {"guidance_scale": 3.0}
    first, second = pyramid.stream("a red plus", **options)
    np.testing.assert_allclose(second[:, :1], after(pipe, first), atol=BYTES)
    if distilled:  # in one program; Mid's has guidance more, which `test_the_one_program` has
        whole = pyramid("a red plus", **options).frames
        np.testing.assert_allclose(np.concatenate([first, second], 1), whole, atol=BYTES)


def test_a_resumed_stream_is_bit_identical(pipe, tmp_path):
    whole = chunks(pipe, 25)
    stream = pipe.stream("a red plus", "a bar", num_frames=25, **ARGUMENTS)
    next(stream)
    stream.save_state(tmp_path / "state")
    for one, other in zip(pipe.resume(tmp_path / "state"), whole[1:], strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_file_goes_on_also_with_frames_that_a_kill_took(config, tmp_path):
    """Two chunks of 9 and 8 frames, of which the file has lost 3, then the rest of 23."""
    out, state = tmp_path / "x", tmp_path / "state"
    options = ["overlap_chunks=true", "history_sizes=[4,2,1]"]
    assert run(config, "--num-frames", 23, "--out", tmp_path / "whole", "format=png", *options) == 0
    assert run(config, "--num-frames", 17, "--out", out, "format=png", "--state", state, *options) == 0
    frames = sorted(out.glob("*.png"))
    assert len(frames) == 17
    for frame in frames[14:]:
        frame.unlink()
    assert run(config, "--num-frames", 23, "--out", out, "format=png", "--resume", state, "--overwrite") == 0
    ours, theirs = sorted(out.glob("*.png")), sorted((tmp_path / "whole").glob("*.png"))
    assert [one.read_bytes() for one in ours] == [other.read_bytes() for other in theirs]


def test_prompts_switch_in_the_chunk_of_their_second(pipe):
    switch = {"prompt": "a blue bar", "seconds": 1.0, "crossfade": 0}
    free, changed = (chunks(pipe, 33, fps=17, switches=switches) for switches in ([], [PromptSwitch(**switch)]))
    same = [np.array_equal(one, other) for one, other in zip(free, changed, strict=True)]
    assert same == [True, True, False, False]  # frame 17 is the first of the third chunk, of 9, 8, 8 and 8


@pytest.mark.parametrize("options", [{"history_sizes": (0, 0, 2)}, {"num_latent_frames_per_chunk": 1}])
def test_chunks_that_cannot_overlap(pipe, options):
    with pytest.raises(ValueError, match="overlap_chunks needs chunks of 2 latent frames or more, and a history of a"):
        chunks(pipe, 9, **options)
