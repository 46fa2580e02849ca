"""Tasks of `helios_jax.precompute`: each plans a dataset, and returns the work that is left.

For unusable input all raise ValueError (CheckpointError), FileNotFoundError or FileExistsError, with a one-line
message, before weights are read.
"""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from helios_jax.data import records, shards
from helios_jax.data.shards import Build, Make, Rejected, Shard
from helios_jax.precompute.clips import Clip, Selection, read_clip, read_lists
from helios_jax.precompute.encode import NEGATIVE_PROMPT, TextEmbedder, VideoEncoder
from helios_jax.precompute.prompt_files import Prompt, read_prompts
from helios_jax.precompute.trajectories import Teacher
from helios_jax.runtime import many
from helios_jax.runtime.many import Cluster
from helios_jax.sampling.fingerprint import weights_hash

Item = TypeVar("Item")
Made = TypeVar("Made")
PATCH = 2  # multiple of latents per side that the transformer takes


@dataclass(frozen=True)
class Work:
    """A planned dataset: its shards and the functions that make them.

    `load` reads the weights and writes the embeddings beside the records, each only if needed. `make` makes the items
    of a shard. `unit` names the items.
    """

    build: Build
    load: Callable[[], None]
    make: Make
    unit: str

    def run(self) -> None:
        """Makes this host's missing shards, and completes the dataset if no others are missing."""
        if self._is_complete():
            return
        self.load()
        shards.run(self.build, self.make, self.unit)

    def start(self) -> Callable[[Shard], list[Rejected]]:
        """Loads the weights, and returns the function that makes one shard."""
        self.load()
        return lambda shard: self.build.write(shard, self.make(shard.items), lambda: None)

    def run_on(self, cluster: Cluster, start: Callable[[], Callable[[Shard], list[Rejected]]]) -> int:
        """Makes the missing shards on a cluster, whose workers call `start`: it plans the same work and starts it.

        Returns the number of shards that failed.
        """
        if self._is_complete():
            return 0
        pending, failed, made, begin = shards.begin(self.build), 0, 0, time.monotonic()
        if not pending:
            self.load()
        for result in many.run(pending, start, done=self.build.done, cluster=cluster, shared=[self.build.folder]):
            for rejected in result.value or ():
                rejected.show()
            failed += result.error is not None
            made += 0 if result.error else len(result.task.items)
        if failed:
            print(f"{failed} of {len(pending)} shards failed; the same command tries them again", file=sys.stderr)
        else:
            shards.complete(self.build, made, self.unit, time.monotonic() - begin)
        return failed

    def _is_complete(self) -> bool:
        """True, with a line that says so, if the dataset is there already."""
        if self.build.complete:
            print(f"{self.build.out}: is complete, made by the same command; nothing is left to do", flush=True)
        return self.build.complete


@dataclass(frozen=True)
class Share:
    """This host's share of the work: a shard has `size` items, and this host makes every `hosts`-th shard."""

    size: int = 64
    host: int = 0
    hosts: int = 1

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"--shard-size is {self.size}: it must be at least 1")


def encode_clips(
    lists: Sequence[Path],
    video: VideoEncoder,
    text: TextEmbedder,
    out: Path,
    *,
    root: Path | None = None,
    selection: Selection = Selection(),  # noqa: B008 (frozen)
    share: Share = Share(),
    negative_prompt: str = NEGATIVE_PROMPT,
    readers: int = 2,
) -> Work:
    """Plans the clips of upstream's JSON `lists` as latents and text embeddings; decodes `readers` clips at a time."""
    frames = video.frames(selection.chunk_frames)
    space = video.config.scale_factor_spatial
    for height, width in selection.sizes:
        if min(height, width) < 1 or height % (PATCH * space) or width % (PATCH * space):
            raise ValueError(f"--size {height}x{width}: height and width must be multiples of {PATCH * space}")
    if readers < 1:
        raise ValueError(f"--readers is {readers}: it must be at least 1")
    found, rejected = read_lists(lists, root, selection)
    buckets: dict[str, list[Clip]] = {}
    for clip in found:
        buckets.setdefault(clip.bucket, []).append(clip)
    # With one size, the features state it; with several, each record states its own shape.
    size = (None, None) if len(buckets) != 1 else tuple(side // space for side in found[0].size)
    build = Build(
        out,
        _features((None, frames, *size, video.config.z_dim), text),
        shards.plan("train", buckets, share.size),
        {**_encoding(video, text, negative_prompt), "selection": asdict(selection)},
        rejected=rejected,
        host=share.host,
        hosts=share.hosts,
    )

    def make(items: Sequence[Clip]) -> Iterator[list[records.Example] | Rejected]:
        named = [(clip.id, clip.caption) for clip in items]
        return encode(video, text, named, ahead(_read, items, readers))

    return Work(build, partial(_load, build, text, negative_prompt, video), make, "clips")


def encode_videos(
    videos: Path,
    video: VideoEncoder,
    text: TextEmbedder,
    out: Path,
    *,
    share: Share = Share(),
    negative_prompt: str = NEGATIVE_PROMPT,
) -> Work:
    """Plans a dataset of pixels (splits train and test) as latents and text embeddings; 9 latent frames per chunk."""
    command = f"python -m helios_jax.toy.build --out {videos}"
    sources = {split: records.open_source(videos, split, make=command) for split in ("train", "test")}
    first = sources["train"][0]
    if missing := {"video", "caption", "id"} - set(first):
        raise ValueError(
            f"{videos}: its records have no {' and no '.join(sorted(missing))} but {', '.join(sorted(first))}; name a "
            "dataset of pixels, as helios_jax.toy.build writes it"
        )
    chunk = 8 * video.config.scale_factor_temporal + 1
    space = video.config.scale_factor_spatial
    t, h, w, _ = first["video"].shape
    if t % chunk:
        raise ValueError(f"{videos}: videos have {t} frames, which is no multiple of a chunk's {chunk}")
    plan = [
        shard
        for split, source in sources.items()
        for shard in shards.plan(split, {"": [(split, i) for i in range(len(source))]}, share.size)
    ]
    build = Build(
        out,
        _features((t // chunk, video.frames(chunk), h // space, w // space, video.config.z_dim), text),
        plan,
        {**_encoding(video, text, negative_prompt), "videos": str(videos)},
        host=share.host,
        hosts=share.hosts,
    )

    def make(items: Sequence[tuple[str, int]]) -> Iterator[list[records.Example] | Rejected]:
        examples = [sources[split][i] for split, i in items]
        named = [(example["id"], example["caption"]) for example in examples]
        pixels = (example["video"].reshape(-1, chunk, h, w, 3) for example in examples)
        return encode(video, text, named, pixels)

    return Work(build, partial(_load, build, text, negative_prompt, video), make, "videos")


def encode_prompts(
    files: Sequence[Path],
    text: TextEmbedder,
    out: Path,
    *,
    share: Share = Share(),
    negative_prompt: str = NEGATIVE_PROMPT,
) -> Work:
    """Plans the prompts of `files` as text embeddings."""
    build = Build(
        out,
        {"text": records.tensor(text.shape, np.float16), "caption": records.text(), "id": records.text()},
        shards.plan("train", {"": read_prompts(files)}, share.size),
        _embedding(text, negative_prompt),
        host=share.host,
        hosts=share.hosts,
    )

    def make(items: Sequence[Prompt]) -> Iterator[list[records.Example]]:
        for prompt, embedding in zip(items, text(prompt.caption for prompt in items)):
            yield [{"text": embedding, "caption": prompt.caption, "id": prompt.id}]

    return Work(build, partial(_load, build, text, negative_prompt), make, "prompts")


def sample_ode_pairs(
    files: Sequence[Path],
    teacher: Teacher,
    out: Path,
    *,
    share: Share = Share(size=8),
) -> Work:
    """Plans ODE pairs of the videos that the teacher samples from the prompts in `files`."""
    build = Build(
        out,
        teacher.features(),
        shards.plan("train", {"": read_prompts(files)}, share.size),
        {"teacher": teacher.identity(), **teacher.facts()},
        host=share.host,
        hosts=share.hosts,
    )

    def load() -> None:
        extra = {records.EMPTY_TEXT: "", records.NEGATIVE_TEXT: teacher.settings.negative_prompt}
        absent = {name: prompt for name, prompt in extra.items() if not build.has(name)}
        if build.pending or absent:
            teacher.load()
        for name, prompt in absent.items():
            build.save(name, teacher.text([prompt])[0])

    return Work(build, load, teacher, "prompts")


def encode(
    video: VideoEncoder,
    text: TextEmbedder,
    named: Sequence[tuple[str, str]],
    pixels: Iterable[np.ndarray | Rejected],
) -> Iterator[list[records.Example] | Rejected]:
    """Yields, in order, the example of each (id, caption) with its chunks of pixels, or the reason for having none."""
    embeddings = text(caption for _, caption in named)
    waiting: deque[Any] = deque()  # (id, caption) or Rejected

    def good() -> Iterator[tuple[str, np.ndarray]]:
        for (name, caption), chunks in zip(named, pixels):
            if isinstance(chunks, Rejected):
                waiting.append(chunks)
            else:
                waiting.append((name, caption))
                yield name, chunks

    def refused() -> Iterator[Rejected]:
        while waiting and isinstance(waiting[0], Rejected):
            next(embeddings)
            yield waiting.popleft()

    for latents in video(good()):
        yield from refused()
        name, caption = waiting.popleft()
        example = {"latents": latents, "text": next(embeddings), "caption": caption, "id": name}
        yield [example] if np.isfinite(latents).all() else Rejected(name, "its latents are not finite")
    yield from refused()


def ahead(function: Callable[[Item], Made], items: Iterable[Item], threads: int) -> Iterator[Made]:
    """`function` of each item, in order; threads compute the next `threads` items ahead."""
    pool = ThreadPoolExecutor(threads)
    try:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _read(clip: Clip) -> np.ndarray | Rejected:
    try:
        return read_clip(clip)
    except (FileNotFoundError, ValueError) as error:
        return Rejected(clip.id, str(error))


def _features(latents: tuple[int | None, ...], text: TextEmbedder) -> dict[str, Any]:
    return {
        "latents": records.tensor(latents, np.float16),
        "text": records.tensor(text.shape, np.float16),
        "caption": records.text(),
        "id": records.text(),
    }


def _embedding(text: TextEmbedder, negative_prompt: str) -> dict[str, Any]:
    """Inputs other than captions that decide the embeddings."""
    weights = weights_hash([text.folder / "text_encoder"])
    return {"text_encoder": weights, "max_length": text.max_length, "negative_prompt": negative_prompt}


def _encoding(video: VideoEncoder, text: TextEmbedder, negative_prompt: str) -> dict[str, Any]:
    """Inputs other than videos that decide the examples."""
    posterior = f"sample, seed {video.seed}" if video.sample else "mean"
    return {"vae": weights_hash([video.folder]), "posterior": posterior, **_embedding(text, negative_prompt)}


def _load(build: Build, text: TextEmbedder, negative_prompt: str, video: VideoEncoder | None = None) -> None:
    """Reads the weights if any work is left, and writes the embeddings beside the records."""
    extra = {records.EMPTY_TEXT: "", records.NEGATIVE_TEXT: negative_prompt}
    absent = {name: prompt for name, prompt in extra.items() if not build.has(name)}
    if build.pending or absent:
        text.load()
    if build.pending and video is not None:
        video.load()
    for name, embedding in zip(absent, text(absent.values()) if absent else ()):
        build.save(name, embedding)
