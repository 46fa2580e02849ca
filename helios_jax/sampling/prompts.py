"""The schedule of prompts: each takes over at a chunk and is faded in by interpolated embeddings."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from helios_jax.sampling.chunk_frames import ChunkFrames
from helios_jax.sampling.options import PromptSwitch, SamplingOptions

# Prompts of a batch, one per video.
Prompts = tuple[str, ...]
# Prompts of a chunk and their weights, which add up to 1: its embedding is the weighted sum.
Mixture = tuple[tuple[Prompts, float], ...]


@dataclass(frozen=True)
class Entry:
    """`prompts` from `chunk` on, faded in over `crossfade` chunks."""

    chunk: int
    prompts: Prompts
    crossfade: int = 0


@dataclass(frozen=True)
class Schedule:
    """Entries in the order of their chunks; the first one is there from the start."""

    entries: tuple[Entry, ...]

    def mixture(self, chunk: int) -> Mixture:
        """The prompts of `chunk` and their weights, which follow linspace(0, 1, crossfade) in a fade (upstream's rule).

        So a fade over N chunks begins with a chunk of the old text and ends with a chunk of the new text. A switch
        during a fade starts from the weights reached.
        """
        *before, last = (entry for entry in self.entries if entry.chunk <= chunk)
        position = chunk - last.chunk
        if not before or position >= last.crossfade:
            return ((last.prompts, 1.0),)
        weight = position / (last.crossfade - 1) if last.crossfade > 1 else 0.0
        weights = {prompts: (1 - weight) * w for prompts, w in Schedule(tuple(before)).mixture(last.chunk - 1)}
        weights[last.prompts] = weights.get(last.prompts, 0.0) + weight
        return tuple((prompts, w) for prompts, w in weights.items() if w > 0)

    def switch(self, entry: Entry) -> "Schedule":
        """The schedule with `entry`; entries planned for its chunk or later are dropped."""
        return Schedule((*(e for e in self.entries if e.chunk < entry.chunk), entry))

    def prune(self, chunk: int) -> "Schedule":
        """The schedule without entries that no chunk from `chunk` on needs, so that a stream's does not grow."""
        if len(self.mixture(chunk)) > 1:
            return self
        past = [i for i, entry in enumerate(self.entries) if entry.chunk <= chunk]
        last = self.entries[past[-1]]
        if chunk - last.chunk < last.crossfade:  # the fade's first chunk still has the old text
            return self
        return Schedule((replace(last, crossfade=0), *self.entries[past[-1] + 1 :]))


def chunk_of(switch: PromptSwitch, options: SamplingOptions, frames: ChunkFrames) -> int:
    """The chunk at which a prompt takes over."""
    if switch.chunk is not None:
        return switch.chunk
    assert switch.seconds is not None
    return frames.chunk(int(switch.seconds * options.fps))


def make_schedule(
    prompts: Sequence[str], switches: Sequence[PromptSwitch], options: SamplingOptions, frames: ChunkFrames
) -> Schedule:
    """The schedule of a call whose videos begin with `prompts` and all follow `switches`; chunks have `frames`.

    Raises ValueError for two switches in one chunk and for one after the video's end.
    """
    entries = [Entry(0, tuple(prompts))]
    chunks = None if options.num_frames is None else frames.chunks(options.num_frames)
    for switch in switches:
        chunk = chunk_of(switch, options, frames)
        place = f"{switch.seconds} s" if switch.chunk is None else f"chunk {chunk}"
        if chunks is not None and chunk >= chunks:
            raise ValueError(
                f"the switch to {switch.prompt!r} at {place} is past the end: num_frames {options.num_frames} is"
                f" {chunks} chunks of {frames.first} frames, counted from 0; ask for more frames or switch sooner"
            )
        crossfade = options.interpolation_steps if switch.crossfade is None else switch.crossfade
        entries.append(Entry(chunk, (switch.prompt,) * len(prompts), crossfade))
    entries.sort(key=lambda entry: entry.chunk)
    for one, other in itertools.pairwise(entries):
        if one.chunk == other.chunk:
            what = "the video begins with" if one.chunk == 0 else "another switch goes to"
            raise ValueError(
                f"the switch to {other.prompts[0]!r} falls into chunk {other.chunk}, where {what} {one.prompts[0]!r}:"
                f" a chunk of {frames.first} frames has one prompt, so switch at least one chunk later"
            )
    return Schedule(tuple(entries))
