"""Samples long videos of held-out captions and scores their drift: the scorer of the toy's ablations.

    python -m helios_jax.toy.rollouts --model runs/x/pipeline --out scores/x num_inference_steps=20 use_anchor=false

Options of sampling are given as for `sample.py configs/toy/sample.yaml`. The folder gets scores.json (as
`helios_jax.ablations.scores` says) and sheet.png.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from helios_jax.ablations import scores
from helios_jax.config import ConfigError, load
from helios_jax.pretrained import CheckpointError
from helios_jax.runtime.command import Parser
from helios_jax.runtime.compilation import enable_cache
from helios_jax.sampling.options import SampleConfig, SamplingOptions
from helios_jax.sampling.pipeline import HeliosPipeline
from helios_jax.toy import world as toy
from helios_jax.toy.metrics import rollout
from helios_jax.toy.report import held_out, picture

PROG = "python -m helios_jax.toy.rollouts"
CONFIG = "toy/sample"
SHOWN = 6  # videos of the picture


def sample(pipe: HeliosPipeline, captions: Sequence[str], options: SamplingOptions, seed: int, batch: int):
    """uint8 videos [t, h, w, 3] of the captions, each with noise of its own; other seeds give other noise."""
    for first in range(0, len(captions), batch):
        prompts = list(captions[first : first + batch])
        seeds = [1000 * seed + first + i for i in range(len(prompts))]
        stream = pipe.stream(prompts, options=options, seed=seeds)
        yield from np.concatenate(list(stream), 1)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = Parser(prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options of sampling")
    parser.add_argument("--model", required=True, help="a diffusers folder of the toy")
    parser.add_argument("--out", type=Path, required=True, help="folder for the scores")
    parser.add_argument("--videos", type=int, default=16, help="held-out captions, one video each [16]")
    parser.add_argument("--chunks", type=int, default=20, help="length of the videos [20, which is 41 seconds]")
    parser.add_argument("--batch", type=int, default=8, help="videos at a time [8]")
    parser.add_argument("--seed", type=int, default=0, help="of the noise [0]")
    try:
        args = parser.parse_intermixed_args(argv)
        for name in ("videos", "chunks", "batch"):
            if getattr(args, name) < 1:
                raise ConfigError(f"--{name} must be at least 1, got {getattr(args, name)}")
        config = load(CONFIG, [*args.overrides, f"num_frames={args.chunks * toy.CHUNK_FRAMES}"], SampleConfig)
        enable_cache()
        pipe = HeliosPipeline.from_pretrained(args.model)
        pipe.plan(config.options())
    except (ConfigError, CheckpointError, ValueError) as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 2
    captions = [toy.caption(scene) for scene in held_out(args.videos)]
    chunk = pipe.plan(config.options()).chunk_frames
    rows, seconds, shown = [], {}, []
    for number, video in enumerate(sample(pipe, captions, config.options(), args.seed, args.batch)):
        values, course = rollout(video, toy.parse_caption(captions[number]), config.fps, chunk)
        rows.append({"id": captions[number], **values})
        for name, each in course.items():
            seconds.setdefault(name, []).append(each)
        if number < SHOWN:
            shown.append(video)
        print(f"{number + 1}/{len(captions)} {captions[number]}", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    picture(shown, captions[:SHOWN], args.out / "sheet.png", columns=14, scale=1)
    scores.write(args.out, rows, seconds, "sheet.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
