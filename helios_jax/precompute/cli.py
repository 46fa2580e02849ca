"""Makes the data of training: latents and text embeddings of videos, ODE pairs of a teacher, embeddings of prompts.

    python -m helios_jax.precompute clips --json data/clips.json --model BestWishYsh/Helios-Base --out data/latents
    python -m helios_jax.precompute ode --prompts prompts.txt --model BestWishYsh/Helios-Mid --out data/ode
    python -m helios_jax.precompute text --prompts prompts.txt --model BestWishYsh/Helios-Base --out data/text
    python -m helios_jax.precompute videos --videos data/toy --vae helios_jax/assets/toy/vae \\
        --text helios_jax/assets/toy --out data/toy-latents

`videos` (a dataset of `helios_jax.toy.build`) is the default task. A killed command continues when it is given again;
OUT.partial holds its work until it is done, and then the same command does nothing. With --ray the workers of a Ray
cluster do the work (docs/pods.md). docs/training.md describes the output.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from helios_jax import pretrained
from helios_jax.data.records import NEGATIVE_TEXT
from helios_jax.data.shards import Rejected, Shard
from helios_jax.locations import path_argument
from helios_jax.messages import one_line
from helios_jax.precompute import tasks
from helios_jax.precompute.clips import SIZES, Selection
from helios_jax.precompute.encode import NEGATIVE_PROMPT, TextEmbedder, VideoEncoder
from helios_jax.precompute.tasks import Share, Work
from helios_jax.precompute.trajectories import Settings, Teacher
from helios_jax.pretrained import CheckpointError
from helios_jax.runtime import interrupts, many
from helios_jax.runtime.command import Parser, frame_size, warnings_as_lines
from helios_jax.runtime.host_number import host_number, use_own_chips
from helios_jax.runtime.memory import is_out_of_memory, use_gpus_whole
from helios_jax.sampling.checkpoint import Checkpoint

LESS_MEMORY = "out of memory: use a smaller --batch, --size or --max-length; the same command goes on"


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and runs it; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        argv = ["videos", *argv]
    try:
        with warnings_as_lines("precompute"):
            return _run(_parser().parse_args(argv))
    except (CheckpointError, FileNotFoundError, FileExistsError, ValueError) as error:
        print(f"precompute: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, or a bucket that does not answer
        print(f"precompute: {error}; the same command goes on", file=sys.stderr)
        return 1
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        print(f"precompute: {one_line(error)}; {LESS_MEMORY}", file=sys.stderr)
        return 1


def _run(args: argparse.Namespace) -> int:
    """Does the work of a command line; returns the exit code."""
    use_gpus_whole()
    try:
        cluster = many.cluster(args.ray, args.ray_worker)
        work = args.plan(args, _share(args))
        if cluster is not None:
            return 1 if work.run_on(cluster, partial(_start, args)) else 0
        work.run()
    except KeyboardInterrupt:
        print(f"precompute: interrupted; the same command goes on with {args.out}", file=sys.stderr)
        return interrupts.EXIT_CODE
    return 0


def _start(args: argparse.Namespace) -> Callable[[Shard], list[Rejected]]:
    """Plans the work again on a machine of a cluster, and returns the function that makes a shard there."""
    use_gpus_whole()
    return args.plan(args, _share(args)).start()


def _clips(args: argparse.Namespace, share: Share) -> Work:
    vae, text = _folders(args, "vae", "text")
    selection = Selection(
        sizes=SIZES if args.size == ["all"] else tuple(frame_size(size) for size in args.size),
        fps=args.fps,
        chunk_frames=args.chunk_frames,
        min_frames=args.min_frames,
        max_frames=args.max_frames,
        caption_key=args.caption_key,
    )
    return tasks.encode_clips(
        args.json,
        VideoEncoder(vae, batch=args.batch, sample=args.posterior == "sample", seed=args.seed),
        TextEmbedder(text, args.max_length),
        args.out,
        root=args.root,
        selection=selection,
        share=share,
        negative_prompt=args.negative_prompt,
        readers=args.readers,
    )


def _videos(args: argparse.Namespace, share: Share) -> Work:
    vae, text = _folders(args, "vae", "text")
    video, text = VideoEncoder(vae, batch=args.batch), TextEmbedder(text, args.max_length)
    return tasks.encode_videos(args.videos, video, text, args.out, share=share, negative_prompt=args.negative_prompt)


def _prompts(args: argparse.Namespace, share: Share) -> Work:
    text = TextEmbedder(_folders(args, "text")[0], args.max_length)
    return tasks.encode_prompts(args.prompts, text, args.out, share=share, negative_prompt=args.negative_prompt)


def _ode(args: argparse.Namespace, share: Share) -> Work:
    height, width = frame_size(args.size)
    settings = Settings(
        height=height,
        width=width,
        num_frames=args.num_frames,
        steps=tuple(args.steps),
        student_steps=tuple(args.student_steps),
        amplify_first_chunk=args.amplify_first_chunk,
        time_shift_type=None if args.time_shift_type == "none" else args.time_shift_type,
        guidance_scale=args.guidance_scale,
        negative_prompt=args.negative_prompt,
        cfg_zero_star=args.cfg_zero_star,
        num_latent_frames_per_chunk=args.num_latent_frames_per_chunk,
        seed=args.seed,
    )
    checkpoint = Checkpoint.open(args.model, transformer=args.transformer)
    teacher = Teacher(checkpoint, settings, batch=args.batch, tensor=args.tensor)
    return tasks.sample_ode_pairs(args.prompts, teacher, args.out, share=share)


def _folders(args: argparse.Namespace, *parts: str) -> list[Path]:
    """The folders --vae and --text name, or those of --model."""
    given = [folder and pretrained.local(folder) for folder in (getattr(args, part) for part in parts)]
    if args.model is None:
        if None in given:
            raise ValueError(f"name {' and '.join(f'--{part}' for part in parts)}, or a --model that has them")
        return given
    need = {"vae": ("vae",), "text": ("text_encoder", "tokenizer")}
    folder = pretrained.resolve(args.model, [name for part in parts for name in need[part]])
    defaults = {"vae": folder / "vae", "text": folder}
    return [own or defaults[part] for part, own in zip(parts, given)]


def _share(args: argparse.Namespace) -> Share:
    if args.processes < 1:
        raise ValueError(f"--processes is {args.processes}: it must be at least 1, the number of hosts")
    share = None
    if args.processes > 1:
        share = Share(args.shard_size, host_number(args.processes), args.processes)
    if args.ray is None:  # the workers of a cluster have what it gave them
        use_own_chips()
    if share is not None:
        return share
    host, _, of = args.shard.partition("/")
    if not (host.isdecimal() and of.isdecimal() and int(host) < int(of)):
        raise ValueError(f"--shard is {args.shard!r}: it must read I/N with I from 0 to N - 1, as in 0/4")
    return Share(args.shard_size, int(host), int(of))


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows short defaults in the help text."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        short = action.default is not None and len(str(action.default)) < 40
        return super()._get_help_string(action) if short else action.help


def _parser() -> Parser:
    parser = Parser(
        prog="python -m helios_jax.precompute",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found = parser.add_subparsers(dest="task", required=True)

    def task(name: str, plan, text: str, *, shard_size: int = 64, batch: str | None = None) -> Parser:
        sub = found.add_parser(name, help=text, description=text, formatter_class=_Help)
        sub.set_defaults(plan=plan)
        sub.add_argument("--out", type=path_argument, required=True, help="folder to make; it must be empty or absent")
        sub.add_argument(
            "--negative-prompt", default=NEGATIVE_PROMPT, help=f"text whose embedding is written to {NEGATIVE_TEXT}"
        )
        if batch is not None:
            sub.add_argument("--batch", type=int, default=1, help=batch)
        sub.add_argument(
            "--shard-size", type=int, default=shard_size, help="items per file; a killed command loses at most one file"
        )
        hosts = sub.add_mutually_exclusive_group()
        hosts.add_argument("--shard", default="0/1", metavar="I/N", help="make the I-th of N shares of the work")
        hosts.add_argument(
            "--processes", type=int, default=1, help="hosts that run this command: a TPU pod, Slurm, or JAX_PROCESS_ID"
        )
        hosts.add_argument(
            "--ray", metavar="ADDRESS", help="Ray cluster that does the work: auto, HOST:PORT, ray://HOST:PORT or local"
        )
        sub.add_argument(
            "--ray-worker",
            metavar="NAME=NUMBER",
            help="what each worker on it needs, such as GPU=1, TPU=4 or CPU=8 (default: a GPU or TPU, else a CPU)",
        )
        return sub

    def networks(sub: Parser, vae: bool = True) -> None:
        sub.add_argument("--model", help="diffusers folder or hub name with all networks")
        if vae:
            sub.add_argument("--vae", type=path_argument, help="folder with the VAE's config.json and weights")
        sub.add_argument("--text", type=path_argument, help="folder with text_encoder/ and tokenizer/")
        sub.add_argument("--max-length", type=int, help="tokens of a caption (default: what the tokenizer allows)")

    sub = task(
        "clips", _clips, "latents and embeddings of the clips in JSON lists", batch="chunks per device at a time"
    )
    sub.add_argument(
        "--json", type=path_argument, required=True, nargs="+", help="upstream's lists: cut, crop, fps, cap, path"
    )
    sub.add_argument("--root", type=path_argument, help="folder that paths are relative to (default: each list's own)")
    networks(sub)
    sub.add_argument(
        "--size", nargs="+", default=["384x640"], help="HEIGHTxWIDTH of the buckets; all: upstream's sizes"
    )
    sub.add_argument("--fps", type=float, help="frames per second to sample (default: all frames)")
    sub.add_argument("--chunk-frames", type=int, default=33, help="frames per chunk")
    sub.add_argument("--min-frames", type=int, default=121, help="shorter clips are skipped")
    sub.add_argument("--max-frames", type=int, help="longer clips are cut to this many frames")
    sub.add_argument(
        "--caption-key", default="cap", help="field with the caption or a list of captions; the first is used"
    )
    sub.add_argument(
        "--posterior",
        choices=("sample", "mean"),
        default="sample",
        help="store a sample or the mean of the VAE's posterior",
    )
    sub.add_argument("--seed", type=int, default=0, help="seed of the posterior's samples")
    sub.add_argument("--readers", type=int, default=2, help="number of clips decoded at a time")

    sub = task("videos", _videos, "latents and embeddings of a dataset of pixels", batch="chunks per device at a time")
    sub.add_argument("--videos", type=path_argument, required=True, help="a dataset of pixels and captions")
    networks(sub)

    sub = task("text", _prompts, "embeddings of prompts alone")
    sub.add_argument(
        "--prompts", type=path_argument, required=True, nargs="+", help=".txt with one prompt per line, or .csv"
    )
    networks(sub, vae=False)

    sub = task("ode", _ode, "ODE pairs of a teacher", shard_size=8, batch="prompts per copy of the model at a time")
    default = Settings()
    sub.add_argument(
        "--prompts", type=path_argument, required=True, nargs="+", help=".txt with one prompt per line, or .csv"
    )
    sub.add_argument("--model", required=True, help="diffusers folder or hub name of the teacher, such as Helios-Mid")
    sub.add_argument("--transformer", default="transformer", help="subfolder of the transformer, or a folder")
    sub.add_argument("--size", default=f"{default.height}x{default.width}", help="HEIGHTxWIDTH of the videos")
    sub.add_argument("--num-frames", type=int, default=default.num_frames, help="frames of each video")
    sub.add_argument("--num-latent-frames-per-chunk", type=int, default=default.num_latent_frames_per_chunk)
    sub.add_argument(
        "--steps", type=int, nargs="+", default=default.steps, help="teacher's steps per level, coarsest first"
    )
    sub.add_argument(
        "--student-steps",
        type=int,
        nargs="+",
        default=default.student_steps,
        help="student's steps per level, whose times are stored",
    )
    sub.add_argument(
        "--amplify-first-chunk",
        action=argparse.BooleanOptionalAction,
        default=default.amplify_first_chunk,
        help="double the student's steps in the first chunk",
    )
    sub.add_argument(
        "--time-shift-type",
        choices=("linear", "exponential", "none"),
        default=default.time_shift_type,
        help="dynamic shift of teacher and student",
    )
    sub.add_argument("--guidance-scale", type=float, default=default.guidance_scale)
    sub.add_argument("--cfg-zero-star", action="store_true", help="use CFG-Zero* guidance")
    sub.add_argument("--seed", type=int, default=default.seed, help="seed of the first prompt; each next prompt adds 1")
    sub.add_argument("--tensor", type=int, default=1, help="devices that share one copy of the model")
    return parser
