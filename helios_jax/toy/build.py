"""Writes the toy world's pixel dataset: `python -m helios_jax.toy.build --out data/toy --videos 3000`.

Features: `video` uint8 [t, h, w, 3] with t = 33 frames a chunk, `caption`, `id`. The split "test" holds captions that
"train" never has. The same arguments write the same examples in the same order.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from helios_jax.data import records
from helios_jax.locations import path_argument
from helios_jax.runtime.command import Tool
from helios_jax.toy import scenes
from helios_jax.toy import world as toy

WORLDS: dict[str, Any] = {"shapes": toy, "scenes": scenes}


def examples(
    split: toy.Split, num: int, frames: int, seed: int, size: int, world: Any = toy
) -> Iterator[records.Example]:
    """`num` examples of a split. Examples of different dataset seeds share no scene seed."""
    for i in range(num):
        scene = world.sample_scene(seed * 10**9 + i, split, size, size)
        yield {"video": world.render(scene, frames), "caption": world.caption(scene), "id": f"{split}-{seed}-{i:06d}"}


def build(
    out: Path,
    *,
    videos: int,
    test_videos: int,
    chunks: int,
    seed: int,
    size: int | None = None,
    world: Any = toy,
) -> Path:
    """Writes `videos` training and `test_videos` test videos of `chunks` x 33 frames into `out`, and returns it.

    `world` is `toy.world` or `toy.scenes`; `size` None takes its own.
    """
    pixels: int = world.NOMINAL_SIZE if size is None else size
    frames = chunks * toy.CHUNK_FRAMES
    return records.write(
        out,
        {
            "video": records.tensor((frames, pixels, pixels, 3), np.uint8),
            "caption": records.text(),
            "id": records.text(),
        },
        {
            "train": examples("train", videos, frames, seed, pixels, world),
            "test": examples("test", test_videos, frames, seed, pixels, world),
        },
    )


def write_captions(out: Path, *, videos: int, seed: int, world: Any = toy) -> None:
    """Writes the captions of the first `videos` training videos into `out`, one per line; captions may repeat."""
    captions = [world.caption(world.sample_scene(seed * 10**9 + i, "train")) for i in range(videos)]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(f"{caption}\n" for caption in captions))


def main(argv: list[str] | None = None) -> None:
    """Parses the command line and builds. Prints one line with what was written."""
    parser = Tool(
        prog="python -m helios_jax.toy.build",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=path_argument, required=True, help="folder to make; it must not hold anything")
    parser.add_argument(
        "--captions", action="store_true", help="write the captions of the training videos alone: --out is a text file"
    )
    parser.add_argument("--videos", type=int, default=3000, help="training videos")
    parser.add_argument("--test-videos", type=int, default=200, help="videos with held-out captions")
    parser.add_argument("--chunks", type=int, default=4, help=f"chunks of {toy.CHUNK_FRAMES} frames a video")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, help="height and width in pixels; by default 64, 128 for scenes")
    parser.add_argument("--world", choices=sorted(WORLDS), default="shapes", help="one shape, or scenes of two")
    args = parser.parse_args(argv)
    world = WORLDS[args.world]
    args.size = world.NOMINAL_SIZE if args.size is None else args.size
    for name in ("videos", "test_videos", "chunks", "size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be at least 1")
    if args.seed < 0:
        parser.error(f"--seed is {args.seed}: it must be 0 or more")
    if args.captions:
        write_captions(args.out, videos=args.videos, seed=args.seed, world=world)
        print(f"{args.out}: {args.videos} training captions")
        return
    try:
        build(
            args.out,
            videos=args.videos,
            test_videos=args.test_videos,
            chunks=args.chunks,
            seed=args.seed,
            size=args.size,
            world=world,
        )
    except FileExistsError as error:
        parser.exit(2, f"{error}\n")
    print(f"{args.out}: {args.videos} training and {args.test_videos} test videos of {args.chunks} chunks")


if __name__ == "__main__":
    main()
