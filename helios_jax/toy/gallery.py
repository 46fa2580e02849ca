"""Pictures of every task of the sampler with the toy model, and the memory of a long stream.

python -m helios_jax.toy.gallery --out docs/results/tasks.md
python -m helios_jax.toy.gallery --out tasks.md --config toy/sample_base

Options of sampling are given as for `sample.py` with the same config.
"""

import dataclasses
import gc
import itertools
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from helios_jax.config import ConfigError, load
from helios_jax.runtime.command import Tool
from helios_jax.runtime.compilation import enable_cache
from helios_jax.sampling.options import PromptSwitch, SampleConfig, SamplingOptions
from helios_jax.sampling.pipeline import HeliosPipeline
from helios_jax.toy import world as toy
from helios_jax.toy.overrides import check_overrides
from helios_jax.toy.report import cost, machine, picture

CHECKS = (20, 100, 200, 300)


def scene(words: str, seed: int) -> toy.Scene:
    """The first scene, from `seed` on, whose caption has all `words`."""
    for number in itertools.count(seed):
        found = toy.sample_scene(number, "test")
        if all(word in toy.caption(found).split() for word in words.split()):
            return found
    raise AssertionError


def tasks(pipe: HeliosPipeline, options: SamplingOptions) -> dict[str, np.ndarray]:
    """uint8 videos [t, h, w, 3] by their description."""

    def make(prompt: str, **arguments) -> np.ndarray:
        return np.concatenate(list(pipe.stream(prompt, options=options, **arguments)), 1)[0]

    plus, bar, square = scene("plus slowly", 0), scene("bar slowly", 10), scene("square slowly", 20)
    image = Image.fromarray(toy.render(bar, 1)[0])
    video = toy.render(square, 2 * toy.CHUNK_FRAMES)
    first, second = toy.caption(plus), toy.caption(scene("square", 40))
    return {
        f"text to video: {first}": make(first, seed=1),
        f"image to video, from a rendered frame: {toy.caption(bar)}": make(toy.caption(bar), image=image, seed=2),
        f"video to video, continues 66 rendered frames: {toy.caption(square)}": np.concatenate(
            [video, make(toy.caption(square), video=video, seed=3)]
        ),
        f"prompt switch at chunk 2, at once: {first} / {second}": make(
            first, switches=[PromptSwitch(second, chunk=2, crossfade=0)], seed=4
        ),
    }


def stream_memory(pipe: HeliosPipeline, options: SamplingOptions) -> list[tuple[int, float, float, float]]:
    """(chunks, seconds, MiB of live arrays, MiB of peak host memory) along one stream without end."""
    rows, begin = [], time.monotonic()
    endless = dataclasses.replace(options, num_frames=None)
    stream = pipe.stream("a red square moves right fast on a black background", options=endless)
    for _ in itertools.islice(stream, CHECKS[-1]):
        if stream.chunk % 50 == 0:
            stream.set_prompt(toy.caption(toy.sample_scene(stream.chunk, "test")))
        if stream.chunk in CHECKS:
            gc.collect()
            held = sum(x.nbytes for x in jax.live_arrays()) / 2**20
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
            rows.append((stream.chunk, time.monotonic() - begin, held, peak))
    return rows


def main(argv: list[str] | None = None) -> int:
    """Parses the command line, samples, measures, writes; returns the exit code."""
    parser = Tool(prog="python -m helios_jax.toy.gallery", description="Show every task.")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options of sampling")
    parser.add_argument("--config", default="toy/sample", help="of sample.py [toy/sample]")
    parser.add_argument("--out", type=Path, required=True, help="Markdown file; the picture goes beside it")
    args = parser.parse_intermixed_args(argv)
    try:
        check_overrides(args.overrides, {"model": "--config", "out": "--out"})
        config = load(args.config, args.overrides, SampleConfig)
    except ConfigError as error:
        parser.error(str(error))
    enable_cache()
    pipe = HeliosPipeline.from_pretrained(config.model)
    options = config.options()
    calls = cost(pipe.plan(options), pipe.transformer.config)["calls"]
    memory = stream_memory(pipe, options)
    videos = tasks(pipe, options)
    image = args.out.with_suffix(".png")
    picture(list(videos.values()), list(videos), image)
    words = " ".join(["python -m helios_jax.toy.gallery", *(sys.argv[1:] if argv is None else argv)])
    lines = [
        "# The sampler's tasks with the toy model",
        "",
        f"`{words}` on {machine()}, jax {version('jax')}; {calls:.0f} calls of the transformer a chunk.",
        "",
        f"![frames of each task's video]({image.name})",
        "",
        "Each row shows frames at even distances over one video. The training videos show one shape throughout, so the",
        "model never saw a prompt switch in training.",
        "",
        "## A stream without end",
        "",
        f"One stream of {CHECKS[-1]} chunks ({CHECKS[-1] * toy.CHUNK_FRAMES} frames), a new prompt every 50 chunks.",
        "",
        "| chunks | seconds | arrays held, MiB | peak host memory, MiB |",
        "| --- | --- | --- | --- |",
        *(f"| {n} | {seconds:.1f} | {held:.2f} | {peak:.0f} |" for n, seconds, held, peak in memory),
        "",
    ]
    args.out.write_text("\n".join(lines))
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
