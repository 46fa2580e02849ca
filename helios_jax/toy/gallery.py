"""Every task of the sampler with the toy model, as pictures, and the memory of a long stream.

python -m helios_jax.toy.gallery --out docs/results/tasks.md
"""

import argparse
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

from helios_jax.runtime.compilation import enable_cache
from helios_jax.sampling.options import PromptSwitch, SamplingOptions
from helios_jax.sampling.pipeline import HeliosPipeline
from helios_jax.toy import world as toy
from helios_jax.toy.report import machine, picture

SIZE = {"height": toy.NOMINAL_SIZE, "width": toy.NOMINAL_SIZE, "guidance_scale": 3.0}
CHECKS = (20, 100, 200, 300)


def scene(words: str, seed: int) -> toy.Scene:
    """The first scene, from `seed` on, whose caption has all `words`."""
    for number in itertools.count(seed):
        found = toy.sample_scene(number, "test")
        if all(word in toy.caption(found).split() for word in words.split()):
            return found
    raise AssertionError


def tasks(pipe: HeliosPipeline, steps: int) -> dict[str, np.ndarray]:
    """uint8 videos [t, h, w, 3] by their description."""

    def make(prompt: str, **arguments) -> np.ndarray:
        options = SamplingOptions(**SIZE, num_frames=4 * toy.CHUNK_FRAMES, num_inference_steps=steps)
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


def stream_memory(pipe: HeliosPipeline) -> list[tuple[int, float, float, float]]:
    """(chunks, seconds, MiB of live arrays, MiB of peak host memory) along one stream without end."""
    options = SamplingOptions(**{**SIZE, "guidance_scale": 1.0}, num_frames=None, num_inference_steps=1)
    rows, begin = [], time.monotonic()
    stream = pipe.stream("a red square moves right fast on a black background", options=options)
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
    parser = argparse.ArgumentParser(prog="python -m helios_jax.toy.gallery", description="Show every task.")
    parser.add_argument("--model", default="helios_jax/assets/toy")
    parser.add_argument("--out", type=Path, required=True, help="Markdown file; the picture goes beside it")
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args(argv)
    enable_cache()
    pipe = HeliosPipeline.from_pretrained(args.model)
    memory = stream_memory(pipe)
    videos = tasks(pipe, args.steps)
    image = args.out.with_suffix(".png")
    picture(list(videos.values()), list(videos), image)
    words = " ".join(["python -m helios_jax.toy.gallery", *(sys.argv[1:] if argv is None else argv)])
    lines = [
        "# The sampler's tasks with the toy model",
        "",
        f"`{words}` on {machine()}, jax {version('jax')}; {args.steps} steps per chunk, guidance 3.",
        "",
        f"![frames of each task's video]({image.name})",
        "",
        "Each row shows frames at even distances over one video. The training videos show one shape throughout, so the",
        "model never saw a prompt switch in training.",
        "",
        "## A stream without end",
        "",
        f"One stream of {CHECKS[-1]} chunks ({CHECKS[-1] * toy.CHUNK_FRAMES} frames), one step per chunk, a new prompt"
        " every 50 chunks.",
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
