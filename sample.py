"""Make a video: python sample.py configs/toy/sample.yaml --prompt "a red square moves right fast on a black background"

The config says what to run; flags and `key=value` arguments override it. Frames go to the mp4 as chunks come, so it can
be watched while it grows and an interrupted run leaves what was made. Exit code 0 when done, 130 when interrupted, 2
for input that cannot be used (one line says which, why, and what to do), before the model is built.
"""

import argparse
import resource
import signal
import sys
import time
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from helios_jax import config as configs
from helios_jax.data.video import VideoWriter
from helios_jax.sampling.config import SampleConfig

FLAGS = {
    "prompt": "what to show",
    "negative_prompt": "what to keep away from",
    "num_frames": "frames of the video, exactly",
    "seed": "the same seed makes the same video",
    "out": "the mp4 to write",
    "model": "a diffusers folder or a hub name",
    "height": "pixels",
    "width": "pixels",
    "num_inference_steps": "denoising steps a chunk (Base)",
    "guidance_scale": "how closely to follow the prompt; 1 switches guidance off and halves the time",
    "fps": "frames a second of the mp4",
    "precision": "float32 or bfloat16",
}
# Fields that say what a call means for a checkpoint.
PLANNED = (
    "height",
    "width",
    "num_frames",
    "num_inference_steps",
    "pyramid_num_inference_steps_list",
    "guidance_scale",
    "use_zero_init",
    "zero_steps",
    "is_amplify_first_chunk",
    "history_sizes",
    "num_latent_frames_per_chunk",
)


def parse(argv: list[str]) -> SampleConfig:
    """The command line over the config; raises ConfigError."""
    parser = argparse.ArgumentParser(prog="sample.py", description="Make a video from a prompt.")
    parser.add_argument("config", help="a YAML file of configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any other field of the config")
    for name, text in FLAGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", help=text, metavar="X")
    args = parser.parse_intermixed_args(argv)
    flags = {name: value for name in FLAGS if (value := getattr(args, name)) is not None}
    return configs.load(args.config, args.overrides, SampleConfig, flags)


def main(argv: list[str]) -> int:
    """Run the command line; returns the exit code."""
    try:
        config = parse(argv)
        # After the arguments: jax takes seconds to import.
        from helios_jax.compile import enable_cache
        from helios_jax.sampling.checkpoint import Checkpoint
        from helios_jax.sampling.plan import make_plan

        enable_cache()
        begin = time.monotonic()
        checkpoint = Checkpoint.open(config.model)
        plan = make_plan(
            checkpoint.transformer,
            checkpoint.vae,
            checkpoint.scheduler,
            checkpoint.variant,
            **{name: getattr(config, name) for name in PLANNED},
        )
        with VideoWriter(config.out, config.fps, config.height, config.width) as writer:
            return sample(config, checkpoint, plan, writer, begin)
    except ValueError as error:  # ConfigError, CheckpointError, VideoError: one line each
        print(f"sample.py: {error}", file=sys.stderr)
        return 2


def sample(config: SampleConfig, checkpoint: Any, plan: Any, writer: VideoWriter, begin: float) -> int:
    """Load, generate chunk by chunk, write, report; returns the exit code."""
    from helios_jax.sampling.pipeline import HeliosPipeline

    pipe = HeliosPipeline.from_pretrained(checkpoint, dtype=config.precision)
    loaded = time.monotonic()
    run = pipe.prepare(
        [config.prompt],
        [config.negative_prompt],
        plan,
        max_sequence_length=config.max_sequence_length,
        seed=config.seed,
    )
    times: list[float] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    interrupted = False
    with Progress(*columns, disable=not sys.stderr.isatty()) as bars:
        chunks = bars.add_task("chunks", total=plan.num_chunks)
        steps = bars.add_task("steps", total=plan.num_steps(0))

        def progress(chunk: int, step: int) -> None:
            bars.update(steps, completed=step + 1, total=plan.num_steps(chunk))

        try:
            for frames in pipe.stream(run, progress):
                writer.write(frames[0])
                times.append(time.monotonic())
                bars.update(chunks, completed=len(times))
                if bars.disable:
                    print(f"chunk {len(times)}/{plan.num_chunks}  {writer.frames} frames", flush=True)
        except KeyboardInterrupt:
            interrupted = True
    report(begin, loaded, times, writer, config.fps)
    if interrupted:
        print(f"interrupted: {config.out} holds the {len(times)} of {plan.num_chunks} chunks that were done")
    return 130 if interrupted else 0


def report(begin: float, loaded: float, times: list[float], writer: VideoWriter, fps: int) -> None:
    """One line a figure. The first chunk includes compiling; the seconds a chunk are those of the later ones."""
    print(f"loading: {loaded - begin:.2f} s")
    if times:
        print(f"time to first chunk: {times[0] - begin:.2f} s")
    if len(times) > 1:
        seconds = (times[-1] - times[0]) / (len(times) - 1)
        print(f"seconds a chunk: {seconds:.2f} s")
        warm, overall = writer.frames / len(times) / seconds, writer.frames / (times[-1] - begin)
        print(f"frames/s: {warm:.1f} warm, {overall:.1f} in all")
    print(f"peak host memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    print(f"video: {writer.path} ({writer.frames} frames, {writer.frames / fps:.1f} s)")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: what was made is kept
    sys.exit(main(sys.argv[1:]))
