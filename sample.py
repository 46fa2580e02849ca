"""Make a video: python sample.py configs/toy/sample.yaml --prompt "a red square moves right fast on a black background"

The config says what to run; flags and `key=value` arguments override it. Frames go to the mp4 as chunks come, so it can
be watched while it grows and an interrupted run leaves what was made. Beside each video lies a JSON file with its
settings and figures. Exit code 0 when done, 1 when some videos of a CSV failed, 130 when interrupted, 2 for input that
cannot be used (one line says which, why, and what to do), before the model is built.
"""

import argparse
import logging
import signal
import sys
import warnings
from typing import Any

from helios_jax import config as configs
from helios_jax.sampling.options import SampleConfig

FLAGS = {
    "what to make": {
        "prompt": "what to show",
        "negative_prompt": "what to keep away from",
        "image": "a picture that the video begins with",
        "video": "a video to be continued, at least a chunk long",
        "csv": "many videos: a CSV with a column prompt (see helios_jax/sampling/options.py)",
        "num_frames": "frames of the video, exactly",
        "seed": "the same seed makes the same video",
        "num_videos_per_prompt": "with seeds seed, seed + 1, ...",
        "height": "pixels",
        "width": "pixels",
    },
    "how to make it": {
        "model": "a diffusers folder or a hub name",
        "num_inference_steps": "denoising steps a chunk (Base)",
        "guidance_scale": "how closely to follow the prompt; 1 switches guidance off and halves the time",
        "interpolation_steps": "chunks over which a prompt fades in after a switch",
        "precision": "float32 or bfloat16",
        "attention": "its implementation: xla, cudnn or pallas",
        "norms": "their implementation: xla or pallas",
    },
    "where it goes": {
        "out": "file.mp4, file.npz (latents), or a folder (PNG frames; with --csv, of all videos)",
        "fps": "frames a second of the mp4",
        "format": "mp4, png or npz, for the videos of --csv",
        "naming": "of the videos of --csv: id or heliosbench",
        "state": "a file to be kept up to date while the video grows, to go on from",
        "resume": "such a file: make what is missing of that video",
        "profile": "a folder for a trace of the second chunk, which is warm, for Perfetto or XProf",
    },
}


def parse(argv: list[str]) -> SampleConfig:
    """The command line over the config; raises ConfigError."""
    parser = argparse.ArgumentParser(
        prog="sample.py",
        description="Make a video from a prompt, an image or a video.",
        epilog="Any other field of the config is set by key=value, as in zero_steps=0; Options and SampleConfig in"
        " helios_jax/sampling/options.py list them all.",
    )
    parser.add_argument("config", help="a YAML file of configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any other field of the config")
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title)
        for name, text in flags.items():
            group.add_argument(f"--{name.replace('_', '-')}", help=text, metavar="X")
        if title == "how to make it":
            group.add_argument("--lora", action="append", metavar="FILE[=SCALE]", help="to merge in; may be repeated")
        if title == "what to make":
            group.add_argument(
                "--then",
                nargs=2,
                action="append",
                metavar=("AT", "PROMPT"),
                help="a prompt that takes over at a chunk (4) or a second (9.5s); may be repeated",
            )
    args = parser.parse_intermixed_args(argv)
    names = [name for flags in FLAGS.values() for name in flags]
    given: dict[str, Any] = {name: value for name in names if (value := getattr(args, name)) is not None}
    if args.lora:
        given["loras"] = args.lora
    if args.then:
        given["switches"] = [
            {"prompt": prompt, **({"seconds": at[:-1]} if at.endswith("s") else {"chunk": at})}
            for at, prompt in args.then
        ]
    return configs.load(args.config, args.overrides, SampleConfig, given)


def main(argv: list[str]) -> int:
    """Run the command line; returns the exit code."""

    shown: set[str] = set()

    def show(message, category, filename, lineno, file=None, line=None):
        if str(message) not in shown:
            print(f"sample.py: warning: {message}", file=sys.stderr)
        shown.add(str(message))

    ours, handler = logging.getLogger("helios_jax"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("sample.py: %(message)s"))
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        try:
            config = parse(argv)
            # After the arguments: jax takes seconds to import.
            from helios_jax.runtime.compilation import enable_cache
            from helios_jax.sampling.run import run

            enable_cache()
            return run(config)
        except (ValueError, FileNotFoundError) as error:  # ConfigError, CheckpointError, ...: one line each
            print(f"sample.py: {error}", file=sys.stderr)
            return 2
        finally:
            ours.removeHandler(handler)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: what was made is kept
    sys.exit(main(sys.argv[1:]))
