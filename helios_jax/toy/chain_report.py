"""Report of `make chain`: loss curves, samples and scores of each stage.

    python -m helios_jax.toy.chain_report --chain runs/toy-chain --out docs/results/chain.md

It writes two pictures beside the Markdown file: the curves of the runs' metrics.jsonl, and videos of the first held-out
captions after every stage.
"""

import json
import platform
import time
from importlib.metadata import version
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image, ImageDraw

from helios_jax.config import load
from helios_jax.runtime.command import Tool
from helios_jax.runtime.compilation import enable_cache
from helios_jax.sampling.options import SampleConfig
from helios_jax.sampling.pipeline import HeliosPipeline
from helios_jax.toy import world as toy
from helios_jax.toy.metrics import aggregate
from helios_jax.toy.report import cost, generate, held_out, machine

# Each stage, and the config of sample.py for its model.
STAGES = {
    "stage1_init": "toy/sample_base",
    "stage1_post": "toy/sample_base",
    "stage2_init": "toy/sample_mid",
    "stage2_post": "toy/sample_mid",
    "stage3_ode": "toy/sample",
    "stage3_distill": "toy/sample",
}
SCORES = ("shape", "colour", "background", "direction", "speed", "colour_error", "contrast", "chunk_jump")
# Curves of the last stage: the loss of each network says more than their sum.
PLAYERS = ("dmd_distance", "critic_loss", "gan_generator", "gan_critic", "gan_penalty")


def curves(chain: Path, path: Path) -> None:
    """One panel per stage: its loss over steps. The last stage shows the loss of each network."""
    figure, axes = plt.subplots(2, 3, figsize=(12, 6), layout="constrained")
    for axis, name in zip(axes.flat, STAGES):
        rows = [json.loads(line) for line in (chain / name / "metrics.jsonl").read_text().splitlines()]
        drawn = [key for key in PLAYERS if any(key in row for row in rows)] or ["loss"]
        for key in drawn:
            points = [(row["step"], row[key]) for row in rows if key in row]
            axis.plot(*zip(*points), label=key)
        axis.set(title=name, yscale="log", xlabel="step")
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def strips(videos: dict[str, list[np.ndarray]], captions: list[str], path: Path, columns: int = 12) -> None:
    """One row per caption and stage, with frames at even distances over the video."""
    rows = []
    for number, caption in enumerate(captions):
        rows.append(_label(caption, 140 + 66 * columns))
        for stage, made in videos.items():
            video = made[number]
            shown = np.linspace(0, len(video) - 1, columns).round().astype(int)
            strip = np.concatenate([np.pad(video[i], ((0, 2), (0, 2), (0, 0)), constant_values=255) for i in shown], 1)
            rows.append(np.concatenate([_label(stage, 140, strip.shape[0]), strip], 1))
    Image.fromarray(np.concatenate(rows)).save(path, optimize=True)


def _label(text: str, width: int, height: int = 18) -> np.ndarray:
    image = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(image).text((4, height // 2 - 6), text, fill="black")
    return np.asarray(image)


def main(argv: list[str] | None = None) -> None:
    """Parses the command line, samples the model of every stage, scores the videos and writes the report."""
    parser = Tool(prog="python -m helios_jax.toy.chain_report", description="Report `make chain`.")
    parser.add_argument("--chain", type=Path, default=Path("runs/toy-chain"), help="folder with the runs of all stages")
    parser.add_argument("--out", type=Path, required=True, help="Markdown file; the pictures go beside it")
    parser.add_argument("--videos", type=int, default=24, help="held-out captions, one video each")
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--shown", type=int, default=3, help="number of captions in the picture")
    args = parser.parse_args(argv)
    if args.chunks < 2:
        parser.error(f"--chunks must be at least 2, to score what happens between them, got {args.chunks}")
    if missing := [name for name in STAGES if not (args.chain / name / "pipeline" / "model_index.json").exists()]:
        parser.error(f"--chain: {args.chain} has no {', '.join(missing)}; run make chain first")
    enable_cache()
    scenes = held_out(args.videos)
    captions = [toy.caption(scene) for scene in scenes]
    attributes = [toy.parse_caption(caption) for caption in captions]
    frames = args.chunks * toy.CHUNK_FRAMES
    videos: dict[str, list[np.ndarray]] = {}
    lines = [
        f"| after | transformer calls per chunk | seconds | {' | '.join(SCORES)} |",
        "| --- |" + " --- |" * (len(SCORES) + 2),
    ]
    for name, config in STAGES.items():
        pipe = HeliosPipeline.from_pretrained(args.chain / name / "pipeline")
        options = load(config, [f"num_frames={frames}"], SampleConfig).options()
        calls = cost(pipe.plan(options), pipe.transformer.config)["calls"]
        begin = time.monotonic()
        videos[name] = generate(pipe, captions, args.videos, options)
        seconds = time.monotonic() - begin
        got = aggregate(videos[name], attributes)
        values = " | ".join(f"{got[key]:.2f}" for key in SCORES)
        lines.append(f"| {name} | {calls:.0f} | {seconds:.0f} | {values} |")
        print(lines[-1], flush=True)
    loss, samples = (args.out.with_name(f"{args.out.stem}_{kind}.png") for kind in ("curves", "samples"))
    curves(args.chain, loss)
    strips({name: made[: args.shown] for name, made in videos.items()}, captions[: args.shown], samples)
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "flax"))
    text = [
        "# The toy's three stages",
        "",
        f"`make chain`, then `python -m helios_jax.toy.chain_report --out {args.out}`: {args.videos}",
        f"held-out captions, {frames} frames each, on {machine()}; Python",
        f"{platform.python_version()}, {versions}. `seconds` covers all videos and includes compilation.",
        "`helios_jax/toy/metrics.py` defines the scores: the first five and `contrast` are best at 1, errors and",
        "jumps at 0.",
        "",
        *lines,
        "",
        f"![losses]({loss.name})",
        "",
        f"![frames after every stage]({samples.name})",
        "",
    ]
    args.out.write_text("\n".join(text))
    print(f"wrote {args.out}, {loss} and {samples}")


if __name__ == "__main__":
    main()
