"""Resumes a video from a saved state: its settings, the settings that may change, and the file to be continued."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from helios_jax.config import ConfigError, to_dict
from helios_jax.media.writers import read_sidecar
from helios_jax.sampling.jobs import ELSEWHERE, NOT_COMPARED, Job
from helios_jax.sampling.options import PromptSwitch, SampleConfig
from helios_jax.sampling.plan import Plan
from helios_jax.sampling.prompts import chunk_of
from helios_jax.sampling.stream import Stream
from helios_jax.sampling.stream_state import State, read_state

# Settings that may differ from a state's: the length, the file's rate, later prompts, and how the video is computed.
FREE = (*ELSEWHERE, *NOT_COMPARED, "num_frames", "fps", "video_fps", "switches", "attention", "norms")
# Settings not taken from a state, because they depend on the machine: the weights' location and the implementations.
FROM_HERE = ("model", "transformer", "attention", "norms", "offload_text_encoder")


def settings_of(state: State, path: str) -> dict[str, Any]:
    """The settings of the run that wrote a state, by the names of `SampleConfig`; a stream in Python stores fewer.

    Raises ConfigError for the state of several videos.
    """
    if state.about is not None:
        return {key: value for key, value in state.about["settings"].items() if key not in FROM_HERE}
    seed, *others = state.noise.seeds
    if others:
        raise ConfigError(f"resume: {path} is of {1 + len(others)} videos, and sample.py makes one: use Python")
    first, later = state.prompts.entries[0], state.prompts.entries[1:]
    return to_dict(state.options) | {
        "prompt": first.prompts[0],
        "switches": [
            {"prompt": e.prompts[0], "chunk": e.chunk, "seconds": None, "crossfade": e.crossfade} for e in later
        ],
        "negative_prompt": state.negatives[0] if state.negatives else "",
        "seed": seed,
    }


def check_typed(config: SampleConfig, settings: Mapping[str, Any], path: str) -> None:
    """Raises ConfigError if the command line asks for another video than the state's `settings` describe."""
    ours = to_dict(config)
    for key, theirs in settings.items():
        if key not in FREE and key in ours and ours[key] != theirs:
            raise ConfigError(
                f"{key}: {ours[key]!r} was asked for, and {path} is of a video with {theirs!r}: leave {key} out,"
                " or begin a new video without resume"
            )


@dataclass(frozen=True)
class Rest:
    """The part of a video that is still to be made: what a saved state leaves, or all of a new video.

    Args:
        chunk: the first chunk to make, counted over the whole video.
        begins: the first chunk in the file.
        in_its_file: True if it is added to the video's file, False if it gets a file of its own.
        keep: the frames (latent ones for an .npz) that the file must have before `chunk`; those of the last chunk can
            be made again if they are missing.
        finished: True if there is nothing left to make.
    """

    chunk: int = 0
    begins: int = 0
    in_its_file: bool = False
    keep: int = 0
    finished: bool = False


NEW = Rest()


def rest_of(job: Job, plan: Plan) -> Rest:
    """The part of the job's video that its saved state leaves to be made; `NEW` if the job does not resume.

    Raises ConfigError if the state is of another video, or if the file holds other chunks than those before the state.
    """
    path, options = job.config.resume, plan.options
    if path is None:
        return NEW
    state = read_state(path)
    _check_inputs(job, state, path)
    _check_switches(job, state, plan, path)
    facts = read_sidecar(job.out)
    begins = None
    if facts is not None and job.out.exists() and set(job.differs(facts)) <= {"num_frames", "switches"}:
        begins = int(facts.get("first_chunk", 0))
        ends = begins + int(facts.get("chunks", 0))  # a run that was killed did not count them
        if begins > state.chunk or (ends > state.chunk and not job.config.overwrite):
            raise ConfigError(
                f"out: {job.out} has chunks {begins} to {ends - 1}, and {path} is before chunk {state.chunk}:"
                " name another out for the rest"
            )
    ended = plan.num_chunks is not None and state.chunk >= plan.num_chunks
    if begins is None:
        return Rest(state.chunk, begins=state.chunk, finished=ended)
    # After a kill the file may lack its last frames: such a video is not finished, unless a shorter one is asked for.
    before = state.options.num_frames
    shorter = options.num_frames is not None and (before is None or options.num_frames < before)
    finished = ended and (shorter or (facts is not None and facts.get("complete") is True))
    if job.out.suffix == ".npz":
        return Rest(state.chunk, begins, True, (state.chunk - begins) * plan.memory.frames_per_chunk, finished)
    ends = plan.frames.before(state.chunk)
    if options.num_frames is not None:
        ends = min(ends, options.num_frames)
    return Rest(state.chunk, begins, True, ends - plan.frames.before(begins), finished)


def check_gap(path: Path, rest: Rest, frames: int, plan: Plan) -> None:
    """Raises ConfigError if a file with so many `frames` lacks more than the last chunk, which can be made again."""
    chunk = plan.memory.frames_per_chunk if path.suffix == ".npz" else plan.frames.of(rest.chunk - 1)
    gap = rest.keep - frames
    if gap > chunk or (gap and plan.memory.frames < plan.memory.frames_per_chunk):
        raise ConfigError(
            f"out: {path} has {frames} frames, and the state is after {rest.keep}: name another out for the rest"
        )


def missing(stream: Stream, rest: Rest, frames: int, plan: Plan) -> np.ndarray:
    """The frames from `frames` to `rest.keep`, which the file lacks, made again from the state's last chunk."""
    chunk = stream.last_chunk()[0]
    last = rest.chunk - 1
    before = (last - rest.begins) * len(chunk)
    if stream.pixels:
        before = plan.frames.before(last) - plan.frames.before(rest.begins)
    return chunk[frames - before : rest.keep - before]


def _check_inputs(job: Job, state: State, path: str) -> None:
    """Raises ConfigError for other weights, LoRAs or inputs than the state's, as far as the state records them."""
    theirs = {} if state.about is None else state.about["inputs"]
    for key, ours in job.inputs.items():
        if state.about is not None and ours is not None and ours != theirs.get(key):
            raise ConfigError(f"{key}: {path} was made with other {key}: give the same, or begin a new video")
    if state.about is None and (job.config.image or job.config.video):
        raise ConfigError(f"resume: {path} has its frames in it: leave image and video out")


def _check_switches(job: Job, state: State, plan: Plan, path: str) -> None:
    """Raises ConfigError for a prompt that would have taken over in a chunk that is made already."""
    theirs = settings_of(state, path)["switches"]
    for one in to_dict(job.config)["switches"]:
        if one not in theirs and (chunk := _chunk_of(one, plan)) < state.chunk:
            raise ConfigError(
                f"switches: {one['prompt']!r} begins at chunk {chunk}, and {path} is before chunk {state.chunk}:"
                " switch there or later, or begin a new video"
            )


def later_switches(config: SampleConfig, plan: Plan, chunk: int) -> list[PromptSwitch]:
    """The prompts that take over at `chunk` or later."""
    return [one for one in config.switches if chunk_of(one, plan.options, plan.frames) >= chunk]


def _chunk_of(switch: Mapping[str, Any], plan: Plan) -> int:
    return chunk_of(PromptSwitch(**switch), plan.options, plan.frames)
