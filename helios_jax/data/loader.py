"""Batches for training: a Grain pipeline that resumes exactly, on any number of hosts.

Example `i` of the endless global stream (shuffled anew each epoch) and its random transform depend on the seed and `i`
alone. Host `j` of `n` takes every n-th of them, so the global batch of a step is the same set on 1, 2 or 4 hosts and
the whole state is the number of the next step.
"""

from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

Example = dict[str, Any]
# (example, generator of this example's random choices) -> example
Transform = Callable[[Example, np.random.Generator], Example]


def loader(
    source: grain.sources.RandomAccessDataSource,
    *,
    seed: int,
    batch_size: int,
    transform: Transform | None = None,
    num_hosts: int = 1,
    host: int = 0,
    start: int = 0,
    threads: int = 2,
) -> grain.DatasetIterator:
    """An endless iterator over this host's `batch_size // num_hosts` examples a step, stacked along a first dimension.

    `batch_size` is global, `start` the first step. `get_state()` is {"next_index": step} and `set_state` takes that of
    any host and any number of hosts. `threads` read ahead (0: none). Raises ValueError for an empty source, a batch
    that hosts cannot share evenly, and a host, start or seed out of range.
    """
    if len(source) == 0:
        raise ValueError("the source has no examples: a loader needs at least one")
    if batch_size < 1 or num_hosts < 1 or batch_size % num_hosts:
        raise ValueError(f"a batch of {batch_size} cannot be shared evenly by {num_hosts} hosts: choose a multiple")
    if not 0 <= host < num_hosts:
        raise ValueError(f"host {host} is not one of {num_hosts}: it must be 0 to {num_hosts - 1}")
    if start < 0:
        raise ValueError(f"start is {start}: it must be 0 or more")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}: it must be 0 to {2**32 - 1}")
    data = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    if transform is not None:
        # Before the hosts' share is taken: its randomness then follows from the global index.
        data = data.random_map(transform)
    data = data[host::num_hosts].batch(batch_size // num_hosts, drop_remainder=True)
    # Threads, not processes: worker processes cannot restore a state made with another number of them.
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(1, 2 * threads))
    iterator = iter(data.to_iter_dataset(options))
    if start:
        iterator.set_state({"next_index": start})
    return iterator


def clip_transform(num_frames: int) -> Transform:
    """A transform that cuts `num_frames` consecutive frames, from a random start, out of `video` [t, h, w, c]."""

    def transform(example: Example, rng: np.random.Generator) -> Example:
        video = example["video"]
        if len(video) < num_frames:
            raise ValueError(f"a video of {len(video)} frames is too short: a clip has {num_frames}")
        first = rng.integers(len(video) - num_frames + 1)
        return {**example, "video": video[first : first + num_frames]}

    return transform


def chunk_transform(history_sizes: Sequence[int], frames_per_chunk: int, first: float | None = None) -> Transform:
    """A transform that picks one chunk of a video to be predicted, with the latents that came before it.

    Each chunk is as likely as the others, or the first one has the probability `first`.

    From `latents` [chunks, t, h, w, c] with t = `frames_per_chunk` and a random chunk k it makes
    `target` [t, h, w, c], chunk k; `history` [sum(history_sizes), h, w, c], the latents just before it, oldest first,
    zeros before the video's start; `anchor` [1, h, w, c], the first latent of the video, zeros when k is 0, where it
    is not known yet; and `chunk`, k. Other entries (the text embedding) pass through.
    """
    size = sum(history_sizes)

    def transform(example: Example, rng: np.random.Generator) -> Example:
        latents = example["latents"]
        if latents.ndim != 5 or latents.shape[1] != frames_per_chunk:
            raise ValueError(f"latents must be [chunks, {frames_per_chunk}, h, w, c], got {list(latents.shape)}")
        if first is not None and len(latents) > 1:
            k = 0 if rng.random() < first else int(rng.integers(1, len(latents)))
        else:
            k = int(rng.integers(len(latents)))
        before = latents[:k].reshape(-1, *latents.shape[2:])[-size:] if size else latents[:0, 0]
        history = np.zeros((size, *latents.shape[2:]), latents.dtype)
        history[size - len(before) :] = before
        anchor = latents[0, :1] if k else np.zeros_like(latents[0, :1])
        rest = {key: value for key, value in example.items() if key != "latents"}
        return {**rest, "target": latents[k], "history": history, "anchor": anchor, "chunk": np.int32(k)}

    return transform
