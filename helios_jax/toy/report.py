"""Samples videos of held-out captions, scores them, and writes a table and a picture.

    python -m helios_jax.toy.report --out docs/results/toy.md                   # the embedded models
    python -m helios_jax.toy.report --out x.md --configs toy/sample_base model=runs/x/pipeline

The table also scores the world's renderings (the limit of the metrics) and their VAE reconstructions (the limit of the
model).
"""

import math
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageDraw

from helios_jax.config import ConfigError, load
from helios_jax.diffusion.pyramid import level_shapes
from helios_jax.models.transformer import TransformerConfig
from helios_jax.models.vae import normalize
from helios_jax.runtime.command import Tool
from helios_jax.runtime.compilation import enable_cache
from helios_jax.sampling.options import SampleConfig, SamplingOptions
from helios_jax.sampling.pipeline import HeliosPipeline, decode
from helios_jax.sampling.plan import Plan
from helios_jax.toy import world as toy
from helios_jax.toy.metrics import aggregate
from helios_jax.toy.overrides import check_overrides

SHOWN = (
    "shape",
    "colour",
    "background",
    "direction",
    "speed",
    "shape_correlation",
    "colour_error",
    "background_error",
    "contrast",
    "speed_error",
    "jump",
    "chunk_jump",
    "colour_shift",
)
CONFIGS = ["toy/sample_base", "toy/sample_mid", "toy/sample"]
DRIFTING = ("shape", "colour", "background", "colour_error", "contrast")


def held_out(videos: int, world: Any = toy) -> list[Any]:
    """Scenes of different held-out captions of `toy.world` or `toy.scenes`."""
    scenes, seen, seed = [], set(), 0
    while len(scenes) < videos:
        scene = world.sample_scene(seed, "test")
        seed += 1
        if world.caption(scene) not in seen:
            seen.add(world.caption(scene))
            scenes.append(scene)
    return scenes


def generate(pipe: HeliosPipeline, captions: list[str], batch: int, options: SamplingOptions) -> list[np.ndarray]:
    """uint8 videos [t, h, w, 3], one for each caption, the n-th with seed n."""
    videos: list[np.ndarray] = []
    for first in range(0, len(captions), batch):
        prompts = captions[first : first + batch]
        seeds = list(range(first, first + len(prompts)))
        videos.extend(np.round(pipe(prompts, seed=seeds, options=options).frames * 255).astype(np.uint8))
    return videos


def cost(plan: Plan, config: TransformerConfig) -> dict[str, float]:
    """Costs of a chunk after the first.

    `calls` of the transformer, `kilotokens` of noise over all calls (in thousands), and `history_tokens` in each call.
    """
    calls, tokens = 0, 0
    for level, shape in zip(plan.levels, level_shapes(plan.latent_shape, len(plan.levels))):
        steps = len(level.steps.sigma) * (1 if plan.guidance_scale is None else 2)
        calls += steps
        tokens += steps * math.prod(shape[:3]) // math.prod(config.patch_size)
    history = plan.memory.num_tokens(*plan.latent_shape[1:3], config.patch_size)
    return {"calls": calls, "kilotokens": tokens / 1000, "history_tokens": history}


def reconstruct(pipe: HeliosPipeline, video: np.ndarray) -> np.ndarray:
    """The VAE's reconstruction of a video, made chunk by chunk."""
    chunks = video.reshape(-1, toy.CHUNK_FRAMES, *video.shape[1:]).astype(np.float32) / 127.5 - 1
    latents = jax.jit(lambda vae, x: normalize(vae.encode(x)[0], vae.config))(pipe.vae, chunks)
    return np.asarray(decode(pipe.vae, latents, dtype="uint8")).reshape(video.shape)


def picture(videos: list[np.ndarray], captions: list[str], path: Path, columns: int = 12, scale: int = 2) -> None:
    """One row per video: its caption above frames at even distances."""
    rows = []
    for video, caption in zip(videos, captions):
        index = np.linspace(0, len(video) - 1, columns).round().astype(int)
        strip = np.concatenate([np.pad(video[i], ((0, 0), (0, 2), (0, 0)), constant_values=255) for i in index], 1)
        strip = strip.repeat(scale, 0).repeat(scale, 1)
        label = Image.new("RGB", (strip.shape[1], 18), "white")
        ImageDraw.Draw(label).text((4, 3), caption, fill="black")
        rows += [np.asarray(label), strip]
    Image.fromarray(np.concatenate(rows)).save(path, optimize=True)


def table(columns: dict[str, dict[str, float]]) -> list[str]:
    """Rows of metrics, one column for each set of videos."""
    lines = [f"| metric | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
    names = list(SHOWN)
    names += [f"{name}_{part}" for name in DRIFTING for part in ("start", "end")]
    for name in names:
        values = " | ".join(f"{column[name]:.3f}" for column in columns.values())
        lines.append(f"| {name} | {values} |")
    return lines


def machine() -> str:
    """The kind of the accelerator, or the number of CPU cores."""
    device = jax.devices()[0]
    return f"{os.cpu_count()} CPU cores" if device.platform == "cpu" else device.device_kind


def main(argv: list[str] | None = None) -> int:
    """Parses the command line, samples, scores, writes; returns the exit code."""
    parser = Tool(prog="python -m helios_jax.toy.report", description="Score the toy's models.")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options of sampling, for all models")
    parser.add_argument("--configs", nargs="+", default=CONFIGS, help=f"of sample.py, a column each {CONFIGS}")
    parser.add_argument("--out", type=Path, required=True, help="Markdown file; the picture goes beside it")
    parser.add_argument("--videos", type=int, default=48, help="held-out captions, one video each")
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_intermixed_args(argv)
    if args.chunks < 2:
        parser.error(f"--chunks must be at least 2, to score what happens between them, got {args.chunks}")
    frames = args.chunks * toy.CHUNK_FRAMES
    try:
        check_overrides(args.overrides, {"model": "--configs", "out": "--out", "num_frames": "--chunks"})
        configs = [load(name, [*args.overrides, f"num_frames={frames}"], SampleConfig) for name in args.configs]
    except ConfigError as error:
        parser.error(str(error))
    scenes = held_out(args.videos)
    captions = [toy.caption(scene) for scene in scenes]
    attributes = [toy.parse_caption(caption) for caption in captions]
    enable_cache()
    real = [toy.render(scene, frames) for scene in scenes]
    columns, told, shown = {"rendered": aggregate(real, attributes)}, [], []
    for config in configs:
        pipe = HeliosPipeline.from_pretrained(config.model)
        if len(columns) == 1:  # all have the same autoencoder
            columns["after the VAE"] = aggregate([reconstruct(pipe, video) for video in real], attributes)
        begin = time.monotonic()
        videos = generate(pipe, captions, args.batch, config.options())
        name = Path(config.model).name
        columns[name] = aggregate(videos, attributes)
        calls = cost(pipe.plan(config.options()), pipe.transformer.config)["calls"]
        told.append(f"`{name}`: {calls:.0f} calls of the transformer a chunk, {time.monotonic() - begin:.0f} s")
        shown += [(f"{name}: {caption}", video) for caption, video in zip(captions[:3], videos)]
    image = args.out.with_suffix(".png")
    picture([video for _, video in shown], [words for words, _ in shown], image)
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "flax"))
    words = " ".join(["python -m helios_jax.toy.report", *(sys.argv[1:] if argv is None else argv)])
    lines = [
        "# The toy's models on held-out captions",
        "",
        f"`{words}`: {args.videos} captions, {frames} frames each ({args.chunks} chunks), on {machine()}; Python",
        f"{platform.python_version()}, {versions}. Seconds are of all videos, with compilation.",
        "",
        *(f"- {line}" for line in told),
        "",
        "`helios_jax/toy/metrics.py` defines the metrics. Errors, jumps and shifts are best at 0, all others at 1.",
        "`_start` and `_end` are the first and the last sixth of the frames.",
        "",
        *table(columns),
        "",
        f"![frames of generated videos]({image.name})",
        "",
    ]
    args.out.write_text("\n".join(lines))
    print("\n".join(table(columns)))
    print(f"wrote {args.out} and {image}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
