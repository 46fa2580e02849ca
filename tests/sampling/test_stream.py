"""Laws of streams: like the one program, bit-identical after a resume, no growth, text that changes on the way."""

import gc
import itertools
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from helios_jax.diffusion.denoise import denoise_step
from helios_jax.runtime.program import program
from helios_jax.sampling import pipeline, sampler, text
from helios_jax.sampling.options import PromptSwitch, SamplingOptions
from tests import tiny

SMALL = {"height": 32, "width": 48, "num_latent_frames_per_chunk": 3, "history_sizes": (4, 2, 1)}
STEPS = {"num_inference_steps": 2, "guidance_scale": 3.0}
WINDOW = 9  # frames of a chunk of 3 latents
SWITCHES = (PromptSwitch("a blue bar", chunk=1, crossfade=0), PromptSwitch("a green plus", chunk=3, crossfade=3))


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline()


def start(pipe, chunks: int | None, **options):
    num_frames = None if chunks is None else chunks * WINDOW
    return pipe.stream("a red plus", "a bar", num_frames=num_frames, **SMALL, **STEPS, **options)


def test_the_one_program_and_the_stream_give_the_same_latents(pipe):
    arguments = {**SMALL, **STEPS, "num_frames": 7 * WINDOW, "switches": SWITCHES, "seed": 3}
    whole = pipe("a red plus", "a bar", output_type="latent", **arguments).frames
    parts = list(pipe.stream("a red plus", "a bar", output_type="latent", **arguments))
    assert [part.shape for part in parts] == [(1, 3, 4, 6, 4)] * 7
    np.testing.assert_array_equal(np.concatenate(parts, 1), whole)


@pytest.mark.parametrize("steps", [2, sampler.AHEAD, sampler.AHEAD + 2])
def test_the_next_chunk_is_queued_before_one_is_handed_out(pipe, monkeypatch, steps):
    """However slow the caller is, the device has a chunk to work on, or the first steps of a long one."""
    queued = recorded(monkeypatch)
    monkeypatch.setattr(sampler, "SLOW_LAUNCH", 1000)  # the first launch compiles
    whole, ahead = ["step"] * steps + ["decode"], ["step"] * sampler.AHEAD
    arguments = {**SMALL, "num_inference_steps": steps, "num_frames": 3 * WINDOW}
    for chunk, _ in enumerate(pipe.stream("a red plus", **arguments), 1):
        rest = whole if steps < sampler.AHEAD else ahead
        assert queued == (whole * 3 if chunk == 3 else whole * chunk + rest)
    assert chunk == 3


@pytest.mark.parametrize("computed", [True, False])
def test_where_launches_wait_a_computed_chunk_does_not(pipe, monkeypatch, computed):
    queued = recorded(monkeypatch)
    monkeypatch.setattr(sampler, "SLOW_LAUNCH", 0)
    monkeypatch.setattr(sampler, "_computed", lambda arrays: computed)
    next(pipe.stream("a red plus", **SMALL, num_inference_steps=4, num_frames=2 * WINDOW))
    assert queued == [*["step"] * 4, "decode", *(["step"] if computed else [*["step"] * 4, "decode"])]


def test_with_progress_a_chunk_waits_for_one_step_only(pipe, monkeypatch):
    queued, seen = recorded(monkeypatch), []
    stream = start(pipe, 2, progress=lambda chunk, step: seen.append((chunk, step)))
    next(stream)
    assert queued == ["step", "step", "decode", "step"]
    assert seen == [(0, 0), (0, 1)]
    next(stream)
    assert seen == [(0, 0), (0, 1), (1, 0), (1, 1)]


def recorded(monkeypatch) -> list[str]:
    """Names of the programs that a stream queues, from here on."""
    queued, step, decode = [], sampler.step_program, pipeline.decode

    def bind(model):
        call = step.bind(model)
        return lambda *args, **kwargs: queued.append("step") or call(*args, **kwargs)

    monkeypatch.setattr(sampler, "step_program", SimpleNamespace(bind=bind))
    monkeypatch.setattr(pipeline, "decode", lambda *args, **kw: queued.append("decode") or decode(*args, **kw))
    return queued


def test_a_second_stream_compiles_nothing(pipe, monkeypatch):
    traced = []

    def step(model, state, level, history, conditioning, memory, held):
        traced.append(state.sample.shape)
        return denoise_step(model, state, level, history, conditioning, memory, held=held)

    monkeypatch.setattr(sampler, "step_program", program(static_argnames="memory", donate_argnames="state")(step))
    for same in (pipe, pipe, tiny.pipeline(seed=1)):
        assert len(list(start(same, 2))) == 2
        assert len(traced) == 1


def test_each_text_is_encoded_once_and_projected_once_in_a_row(pipe, monkeypatch):
    encoded, projected = [], []
    encode, project = pipe.encode_prompt, text.text_kv
    monkeypatch.setattr(pipe, "encode_prompt", lambda prompts, **kw: encoded.extend(prompts) or encode(prompts, **kw))
    monkeypatch.setattr(text, "text_kv", lambda *args: projected.append(1) or project(*args))
    again = (*SWITCHES, PromptSwitch("a blue bar", chunk=7, crossfade=0))
    assert len(list(start(pipe, 9, switches=again))) == 9
    assert sorted(encoded) == ["a bar", "a blue bar", "a green plus", "a red plus"]
    assert len(projected) == 5  # red; blue; the fade's middle; green; blue


@pytest.mark.parametrize("stop", [1, 4])
def test_a_resumed_stream_is_bit_identical(pipe, tmp_path, stop):
    expected = list(start(pipe, 7, switches=SWITCHES, seed=7))
    stream = start(pipe, 7, switches=SWITCHES, seed=7)
    for _ in range(stop):
        next(stream)
    stream.save_state(tmp_path / "new" / "state")
    del stream
    resumed = tiny.pipeline().resume(tmp_path / "new" / "state")
    assert resumed.chunk == stop
    got = list(resumed)
    assert len(got) == 7 - stop
    for one, other in zip(got, expected[stop:], strict=True):
        np.testing.assert_array_equal(one, other)
    # A resumed stream can be put away again, at its end, and be made longer.
    resumed.save_state(tmp_path / "end")
    longer = list(pipe.resume(tmp_path / "end", num_frames=8 * WINDOW))
    assert len(longer) == 1
    np.testing.assert_array_equal(longer[0], list(start(pipe, 8, switches=SWITCHES, seed=7))[7])


def test_live_prompts_are_those_of_a_plan(pipe):
    planned = list(start(pipe, 5, switches=[PromptSwitch("a blue bar", chunk=2, crossfade=2)], seed=1))
    stream = start(pipe, None, seed=1)
    got = [next(stream)]  # chunk 1 has begun by now
    assert stream.set_prompt("a blue bar", crossfade=2) == 2
    got += itertools.islice(stream, 4)
    for one, other in zip(got, planned, strict=True):
        np.testing.assert_array_equal(one, other)
    unchanged = list(start(pipe, 5, seed=1))
    same = [np.array_equal(one, other) for one, other in zip(got, unchanged, strict=True)]
    assert same == [True, True, True, False, False]  # a fade begins with a chunk of the text before


def test_a_live_prompt_before_the_first_chunk(pipe):
    stream = start(pipe, 1)
    assert stream.set_prompt("a blue bar") == 0
    other = pipe.stream("a blue bar", "a bar", num_frames=WINDOW, **SMALL, **STEPS)
    np.testing.assert_array_equal(next(stream), next(other))


def test_an_endless_stream_does_not_grow(pipe):
    """130 chunks: at 33 frames a chunk and 24 frames a second, three minutes; here the memory held is what counts."""
    stream = pipe.stream(
        "a red plus", num_frames=None, num_inference_steps=1, guidance_scale=1.0, **SMALL, output_type="latent"
    )
    held = []
    for chunk, _ in enumerate(itertools.islice(stream, 130)):
        if chunk % 50 == 40:
            stream.set_prompt(f"prompt {chunk}", crossfade=2)
        if chunk % 50 == 20:
            gc.collect()
            held.append(sum(x.nbytes for x in jax.live_arrays()))
    assert stream.chunk == 130
    assert max(held[1:]) <= held[0] * 1.01, held
    assert len(stream._prompts.entries) <= 2


def test_a_video_is_the_same_alone_and_in_a_batch(pipe):
    arguments = {**SMALL, **STEPS, "num_frames": 2 * WINDOW, "output_type": "latent"}
    both = pipe(["a red plus", "a blue bar"], num_videos_per_prompt=2, seed=4, **arguments).frames
    assert both.shape[0] == 4
    for i, (prompt, seed) in enumerate(itertools.product(["a red plus", "a blue bar"], [4, 5])):
        alone = pipe(prompt, seed=seed, **arguments).frames
        np.testing.assert_allclose(both[i : i + 1], alone, atol=1e-4)
    np.testing.assert_allclose(pipe(["a blue bar"] * 2, seed=[5, 4], **arguments).frames, both[[3, 2]], atol=1e-4)


class Zeros:
    def normal(self, site, shape):
        return np.zeros(shape, np.float32)

    uniform = normal


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda pipe, path: pipe.resume(path / "none"), ["none", "no such file"]),
        (lambda pipe, path: pipe.resume(path / "text"), ["text", "save_state"]),
        (lambda pipe, path: start(pipe, 1).save_state(path / "s") or other(path), ["variant"]),
        (lambda pipe, path: start(pipe, 1, noise=Zeros()).save_state(path / "x"), ["noise=", "seed="]),
        (lambda pipe, path: start(pipe, 1).set_prompt(" "), ["set_prompt"]),
        (lambda pipe, path: start(pipe, 1).set_prompt("a", -1), ["crossfade"]),
        (lambda pipe, path: start(pipe, 1, seed=[1, 2]), ["seed", "2 numbers", "1 videos"]),
        (lambda pipe, path: start(pipe, 1, num_videos_per_prompt=0), ["num_videos_per_prompt"]),
        (lambda pipe, path: pipe("a", num_frames=None), ["num_frames", "stream"]),
        (lambda pipe, path: pipe([]), ["prompt", "at least one"]),
    ],
)
def test_bad_use_is_one_line(pipe, tmp_path, act, words):
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError) as error:
        act(pipe, tmp_path)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def other(path):
    """Resumes with a pipeline of another kind."""
    pipe = tiny.pipeline()
    pipe.variant = type(pipe.variant)(pyramid=True)
    pipe.resume(path / "s")


def test_sizes_that_were_never_trained_warn(pipe):
    with pytest.warns(UserWarning, match="64 x 48.*trained at 32 x 48"):
        pipe.plan(SamplingOptions(height=64, width=48))
