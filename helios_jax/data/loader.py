"""Batches for training: a Grain pipeline that resumes exactly, on any number of hosts.

Example `i` of the endless global stream (shuffled anew each epoch) and its random transform depend on the seed and `i`
alone. A host reads some rows of each global batch (`helios_jax.sharding.batch_rows`), so a step has the same batch, in
the same order, on any number of hosts. The whole state is the number of the next step. A source with buckets has one
stream per bucket. Every step belongs to one bucket, the same on all hosts; a bucket's share of the steps is its share
of the examples.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags

from helios_jax.data.records import RecordError, leaving_out

Example = dict[str, Any]
# (example, generator of this example's random choices) -> example
Transform = Callable[[Example, np.random.Generator], Example]
AHEAD = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)  # records that are read before they are needed


class Batches(Protocol):
    """An iterator over batches (numpy, this host's rows) whose position, plain JSON, can be saved and set again."""

    def __next__(self) -> Any: ...
    def __iter__(self) -> Iterator[Any]: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...


def loader(
    source: grain.sources.RandomAccessDataSource,
    *,
    seed: int,
    batch_size: int,
    transform: Transform | None = None,
    rows: Sequence[int] | None = None,
    workers: int = 0,
) -> Batches:
    """An endless iterator over `rows` of the global batch of each step (None: all), stacked along a first dimension.

    `batch_size` is global. `get_state()` is {"next_index": step}; `set_state` takes the state of any host, whatever the
    numbers of hosts and workers were. Threads read ahead, in each of `workers` processes if there are any. Workers
    serve transforms that keep a core busy, and take some seconds to start. Each batch of a source with `buckets`
    (`records.Source`) is of one bucket.

    Raises ValueError for an empty source, and for a size, rows, seed or number of workers out of range. The iteration
    ends with RecordError at a record that cannot be read, or that `transform` refuses with ValueError or KeyError.
    """
    if len(source) == 0:
        raise ValueError("the source has no examples: a loader needs at least one")
    if batch_size < 1:
        raise ValueError(f"a batch of {batch_size} has no examples: it must have at least one")
    rows = range(batch_size) if rows is None else rows
    if not rows or not all(0 <= row < batch_size for row in rows):
        raise ValueError(f"rows {list(rows)} are not of a batch of {batch_size}: they must be 0 to {batch_size - 1}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}: it must be 0 to {2**64 - 1}")
    if workers < 0:
        raise ValueError(f"workers is {workers}: it must be 0 or more")

    def batches(examples: range, seed: int) -> grain.MapDataset:
        data = grain.MapDataset.source(_Numbered(source))
        if len(examples) < len(source):
            data = data[examples.start : examples.stop]
        data = data.seed(seed).shuffle().repeat()
        # Before each host takes its rows: the transform's randomness then follows from the global index.
        data = data.random_map(_Apply(transform, repr(source)))
        return _Rows(data, batch_size, rows).batch(len(rows), drop_remainder=True)

    buckets: Mapping[str, range] = getattr(source, "buckets", {"": range(len(source))})
    parts = [batches(examples, _seed(seed, i)) for i, examples in enumerate(buckets.values())]
    data = parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, [len(x) for x in buckets.values()])
    return Workers(data, workers) if workers else iter(data.to_iter_dataset(AHEAD))


def _seed(seed: int, bucket: int) -> int:
    """A seed for each bucket, so that buckets make different random choices.

    Grain takes 32 bits. All 64 bits of a larger seed count: they are hashed.
    """
    if bucket == 0 and seed < 2**32:
        return seed
    return int(np.random.SeedSequence([seed, bucket]).generate_state(1)[0])


class _Rows(grain.MapDataset):
    """Some rows of each batch of `batch_size` examples, one batch after the other."""

    def __init__(self, parent: grain.MapDataset, batch_size: int, rows: Sequence[int]):
        super().__init__(parent)
        self._batch_size, self._rows = batch_size, tuple(rows)

    def __len__(self) -> int:
        return len(self._parent) // self._batch_size * len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        batch, place = divmod(index, len(self._rows))
        return self._parent[batch * self._batch_size + self._rows[place]]


class _Numbered:
    """A source of pairs (number, example)."""

    def __init__(self, source: grain.sources.RandomAccessDataSource):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return int(index), self._source[index]

    def __repr__(self) -> str:
        # Grain shows this name in its errors.
        return repr(self._source)


class _Apply(grain.transforms.RandomMap):
    """Applies a transform to numbered examples; raises RecordError with the number of one that it refuses."""

    def __init__(self, transform: Transform | None, source: str):
        self._transform, self._source = transform, source

    def random_map(self, element: tuple[int, Any], rng: np.random.Generator) -> Any:
        number, example = element
        try:
            return example if self._transform is None else self._transform(example, rng)
        except (ValueError, KeyError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else error
            raise RecordError(f"{self._source}: record {number}: {reason}, or {leaving_out(number)}") from None


class Workers:
    """Batches from `workers` processes, in the same order as from one process.

    Grain's own state depends on the number of workers; here the position is just a step. The processes start at this
    step when the first batch is asked for, and again after `set_state`.
    """

    def __init__(self, data: grain.MapDataset, workers: int):
        self._data, self._workers, self._step = data, workers, 0
        self._iterator: Any = None

    def __iter__(self) -> "Workers":
        return self

    def __next__(self) -> Any:
        if self._iterator is None:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain passes its flags to the processes; they must count as parsed
            data = self._data[self._step :].to_iter_dataset(AHEAD)
            options = grain.MultiprocessingOptions(num_workers=self._workers)
            self._iterator = iter(data.mp_prefetch(options, _begin_worker))
        batch = next(self._iterator)
        self._step += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        return {"next_index": self._step}

    def set_state(self, state: dict[str, Any]) -> None:
        self.close()
        self._step = int(state["next_index"])

    def close(self) -> None:
        """Ends the processes."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


def _begin_worker(worker: int, workers: int) -> None:
    """Prepares a worker process: it ignores Ctrl-C and ends with its parent.

    Ctrl-C reaches every process of a terminal, but only the training process acts on it. A worker without its parent
    would wait for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def clip_transform(num_frames: int) -> Transform:
    """A transform that cuts `num_frames` consecutive frames, from a random start, out of `video` [t, h, w, c]."""

    def transform(example: Example, rng: np.random.Generator) -> Example:
        video = example["video"]
        if len(video) < num_frames:
            raise ValueError(f"a video of {len(video)} frames is too short: a clip has {num_frames}")
        first = rng.integers(len(video) - num_frames + 1)
        return {**example, "video": video[first : first + num_frames]}

    return transform


def chunk_transform(
    history_frames: int, frames_per_chunk: int, num_chunks: int = 1, *, first: float | None = None
) -> Transform:
    """A transform that picks the chunks to be predicted, with the latents before them.

    The first picked chunk k is drawn uniformly, or is the video's first chunk with probability `first`.

    From `latents` [chunks, t, h, w, c] with t = `frames_per_chunk` it makes: `target` [num_chunks * t, h, w, c], the
    `num_chunks` chunks from k on; `history` [history_frames, h, w, c], the latents just before them, oldest first,
    zeros before the video's start; `anchor` [1, h, w, c], the first latent of the video, zeros when k is 0, where it
    is not known yet; and `chunk`, k. Other entries (the text embedding) pass through.
    """

    def transform(example: Example, rng: np.random.Generator) -> Example:
        latents = example["latents"]
        if latents.ndim != 5 or latents.shape[1] != frames_per_chunk:
            raise ValueError(f"latents must be [chunks, {frames_per_chunk}, h, w, c], got {list(latents.shape)}")
        if len(latents) < num_chunks:
            raise ValueError(
                f"{example.get('id', 'a video')} has {len(latents)} chunks, a target {num_chunks}: precompute the data "
                f"with --min-frames of as many chunks"
            )
        starts = len(latents) - num_chunks + 1
        if first is not None and starts > 1:
            k = 0 if rng.random() < first else int(rng.integers(1, starts))
        else:
            k = int(rng.integers(starts))
        before = latents[:k].reshape(-1, *latents.shape[2:])[-history_frames:] if history_frames else latents[:0, 0]
        history = np.zeros((history_frames, *latents.shape[2:]), latents.dtype)
        history[history_frames - len(before) :] = before
        anchor = latents[0, :1] if k else np.zeros_like(latents[0, :1])
        target = latents[k : k + num_chunks].reshape(-1, *latents.shape[2:])
        rest = {key: value for key, value in example.items() if key != "latents"}
        return {**rest, "target": target, "history": history, "anchor": anchor, "chunk": np.int32(k)}

    return transform


def ode_transform(example: Example, rng: np.random.Generator) -> Example:
    """Picks a step at each level of an ODE pair (`helios_jax.precompute.trajectories`).

    The result has lists over the levels, coarsest first: `noisy`, the latents at the step's start, and `target`, the
    level's result (both [t, h_i, w_i, c]), `timestep` and `sigma`. Other entries (history, anchor, chunk, text) pass
    through.
    """
    levels = range(sum(key.startswith("latents_") for key in example))
    places = [int(rng.integers(len(example[f"timesteps_{i}"]))) for i in levels]
    made = {
        "noisy": [example[f"latents_{i}"][place] for i, place in zip(levels, places)],
        "target": [example[f"latents_{i}"][-1] for i in levels],
        "timestep": [example[f"timesteps_{i}"][place] for i, place in zip(levels, places)],
        "sigma": [example[f"sigmas_{i}"][place] for i, place in zip(levels, places)],
    }
    return {**{key: value for key, value in example.items() if not _of_level(key)}, **made}


def _of_level(key: str) -> bool:
    return key.rpartition("_")[0] in ("latents", "timesteps", "sigmas")
