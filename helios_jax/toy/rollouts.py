"""Samples long videos of held-out captions and scores their drift: the scorer of the toy's ablations.

    python -m helios_jax.toy.rollouts --model runs/x/pipeline --out scores/x num_inference_steps=20 use_anchor=false
    python -m helios_jax.toy.rollouts --model runs/x/pipeline --out scores/x --wordless

A caption tells every chunk anew what to show, so that a video of the toy hardly drifts. With `--wordless` the video
goes on from a rendered chunk of its scene and the prompt is empty: the memory alone knows its looks and its motion.
The rendered chunk is then the first of the scored video, but has no part in `latent_border_ratio`.

Options of sampling are given as for `sample.py configs/toy/sample_base.yaml`, or with `--world scenes`, the larger
world, as for configs/scenes/sample.yaml. The folder gets scores.json (as `helios_jax.ablations.scores` says) and
sheet.png.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from helios_jax.ablations import scores
from helios_jax.config import ConfigError, load
from helios_jax.locations import check_locations
from helios_jax.path_checks import check_folder
from helios_jax.pretrained import CheckpointError
from helios_jax.runtime.command import Parser
from helios_jax.runtime.compilation import enable_cache
from helios_jax.runtime.seeds import check_seed
from helios_jax.sampling.checkpoint import Checkpoint
from helios_jax.sampling.chunk_frames import ChunkFrames
from helios_jax.sampling.options import SampleConfig, SamplingOptions
from helios_jax.sampling.pipeline import HeliosPipeline
from helios_jax.toy import scene_metrics, scenes
from helios_jax.toy import world as toy
from helios_jax.toy.metrics import latent_border_ratio, rollout
from helios_jax.toy.overrides import check_overrides
from helios_jax.toy.report import cost, held_out, picture

PROG = "python -m helios_jax.toy.rollouts"


@dataclass(frozen=True)
class World:
    """A toy world: its module, the config of its videos, and (video, scene, fps, chunks) -> scores and their course."""

    module: Any
    config: str
    score: Callable[..., tuple[dict[str, float], dict[str, list[float]]]]


WORLDS = {
    "shapes": World(toy, "toy/sample_base", rollout),
    "scenes": World(
        scenes, "scenes/sample", lambda video, scene, *rest: scene_metrics.rollout(video, scenes.caption(scene), *rest)
    ),
}
SHOWN, COLUMNS = 6, 14  # videos of the picture, and frames of each
FLAGS = {"model": "--model", "out": "--out", "seed": "--seed", "num_frames": "--chunks"}


def sample(
    pipe: HeliosPipeline, all_scenes: Sequence[Any], options: SamplingOptions, args: Any
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Videos uint8 [t, h, w, 3] of the scenes, and latents [chunks, t, h, w, c]; other seeds give other noise."""
    world = WORLDS[args.world].module
    for first in range(0, len(all_scenes), args.batch):
        part = all_scenes[first : first + args.batch]
        seeds = [1000 * args.seed + first + i for i in range(len(part))]
        if args.wordless:
            begun = [np.stack([world.render(scene, toy.CHUNK_FRAMES) for scene in part])]
            stream = pipe.stream([""] * len(part), video=begun[0], options=options, seed=seeds)
        else:
            begun, stream = [], pipe.stream([world.caption(scene) for scene in part], options=options, seed=seeds)
        frames, latents = zip(*((frames, stream.latents) for frames in stream), strict=True)
        yield from zip(np.concatenate([*begun, *frames], 1), np.stack(latents, 1), strict=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = Parser(prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options of sampling")
    parser.add_argument("--model", required=True, help="a diffusers folder of the toy")
    parser.add_argument("--out", required=True, help="local folder for the scores")
    parser.add_argument(
        "--world", choices=sorted(WORLDS), default="shapes", help="one shape, or scenes of two [shapes]"
    )
    parser.add_argument("--videos", type=int, default=16, help="held-out captions, one video each [16]")
    parser.add_argument("--chunks", type=int, default=20, help="length of the videos [20, which is 41 seconds]")
    parser.add_argument("--batch", type=int, default=8, help="videos at a time [8]")
    parser.add_argument("--seed", type=int, default=0, help="of the noise [0]")
    parser.add_argument("--wordless", action="store_true", help="go on from a rendered chunk, with an empty prompt")
    parser.add_argument(
        "--borders", action="store_true", help="the picture shows each frame around the first border of chunks"
    )
    try:
        args = parser.parse_intermixed_args(argv)
        for name, least in {"videos": 1, "batch": 1, "chunks": 1 + args.wordless}.items():
            if getattr(args, name) < least:
                raise ConfigError(f"--{name} must be at least {least}, got {getattr(args, name)}")
        last = check_seed(args.seed, "--seed") * 1000 + args.videos - 1
        check_seed(last, "the last video's seed, 1000 times --seed,")
        check_locations(local=True, **{"--out": args.out})
        check_overrides(args.overrides, FLAGS)
        world, out = WORLDS[args.world], Path(os.path.expanduser(args.out))
        # Guidance would lead away from the empty prompt, which is the prompt here.
        plain = ["guidance_scale=1"] if args.wordless else []
        begun = args.wordless * toy.CHUNK_FRAMES
        frames = args.chunks * toy.CHUNK_FRAMES - begun
        config = load(world.config, [*plain, *args.overrides, f"num_frames={frames}"], SampleConfig)
        enable_cache()
        checkpoint = Checkpoint.open(args.model)
        check_folder(out)
        pipe = HeliosPipeline.from_pretrained(checkpoint)
        plan = pipe.plan(config.options())
    except (ConfigError, CheckpointError, ValueError) as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 2
    all_scenes = held_out(args.videos, world.module)
    chunks = plan.frames
    if begun and config.overlap_chunks:  # the first chunk begins with the rendered one's last frame: no border to score
        chunks = ChunkFrames(begun + chunks.first, chunks.later)
    captions = [world.module.caption(scene) for scene in all_scenes]
    rows, seconds, shown = [], {}, []
    for number, (video, latents) in enumerate(sample(pipe, all_scenes, config.options(), args)):
        # A caption names a band of hues; a rendered chunk shows which one it is.
        target = all_scenes[number] if args.wordless or args.world == "scenes" else toy.parse_caption(captions[number])
        values, course = world.score(video, target, config.fps, chunks)
        values |= {"latent_border_ratio": latent_border_ratio(latents), **cost(plan, pipe.transformer.config)}
        rows.append({"id": captions[number], **values})
        for name, each in course.items():
            seconds.setdefault(name, []).append(each)
        if number < SHOWN:
            border = chunks.before(1)
            shown.append(video[border - COLUMNS // 2 : border + COLUMNS // 2] if args.borders else video)
        print(f"{number + 1}/{len(captions)} {captions[number]}", flush=True)
    picture(shown, captions[:SHOWN], out / "sheet.png", columns=COLUMNS, scale=1)
    scores.write(out, rows, seconds, "sheet.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
