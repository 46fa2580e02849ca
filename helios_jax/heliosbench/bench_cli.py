"""The benchmark's command: judges folders of videos, and writes scores, ratings and a report.

    python -m helios_jax.heliosbench VIDEOS --prompts helios_t2v_prompts.csv --out DIR
    python -m helios_jax.heliosbench ours theirs --prompts helios_t2v_prompts.csv --out DIR \\
        --weights BestWishYsh/HeliosBench-Weights --judge http://localhost:8000/v1 --judge-model qwen3-vl

A metric whose weights, packages or service are absent is reported as missing, and the total as partial. The same
command goes on with an interrupted run.
"""

import argparse
import os
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from helios_jax.config import ConfigError
from helios_jax.heliosbench import bench_run, judge, model_files, naturalness, rating, result_files, table_scores
from helios_jax.heliosbench.bench_report import BenchReport
from helios_jax.heliosbench.bench_run import SetupError, Task, warn
from helios_jax.heliosbench.bench_videos import find_videos, read_prompts
from helios_jax.heliosbench.judge import Judge, JudgeError
from helios_jax.heliosbench.measure import View
from helios_jax.heliosbench.metric import Clip, MissingError
from helios_jax.heliosbench.recipes import MAKERS, Needs, make_recipes
from helios_jax.locations import check_locations, path_argument
from helios_jax.path_checks import check_folder
from helios_jax.runtime.command import Parser, count, frame_size

PROG = "python -m helios_jax.heliosbench"
CODES = "exit codes: 0 done, 1 some videos failed, 2 input that cannot be used, 130 interrupted"
LOCAL_WORKERS = 4  # processes at most, unless told otherwise: each holds a video's flow maps and metrics


def make_parser() -> Parser:
    """The parser."""
    parser = Parser(
        prog=PROG,
        usage="%(prog)s VIDEOS [VIDEOS ...] --prompts CSV --out DIR [options]",
        description="Judge long videos as the Helios paper does.",
        epilog=f"{CODES}. A folder's name is the model's name in the results.",
    )
    parser.add_argument("videos", nargs="+", type=path_argument, help="folders with videos such as 2_240_ori264.mp4")
    parser.add_argument("--prompts", type=path_argument, required=True, metavar="CSV", help="ids and prompts")
    parser.add_argument("--out", type=path_argument, required=True, metavar="DIR", help="folder of the results")
    parser.add_argument(
        "--length", choices=rating.LENGTHS, default="long", help="short: the first 81 frames, without drifts [long]"
    )
    parser.add_argument(
        "--strict-upstream", action="store_true", help="rate with upstream's slips, for its exact numbers"
    )
    parser.add_argument(
        "--metrics", nargs="+", metavar="METRIC", choices=list(MAKERS), default=list(MAKERS), help=", ".join(MAKERS)
    )
    parser.add_argument("--size", default="384x640", metavar="HxW", help="size that metrics see [384x640]")
    parser.add_argument("--chunk", type=count, default=33, metavar="N", help="frames of a chunk, for border_jumps [33]")
    parser.add_argument(
        "--overlap", action="store_true", help="chunks overlap (sample.py's overlap_chunks), for border_jumps"
    )
    parser.add_argument(
        "--workers", type=count, metavar="N", help="processes that measure [1 with weights, else the cores, up to 4]"
    )
    parser.add_argument(
        "--fps", action="append", default=[], metavar="NAME=FPS", help="speed of a model, to rate; may be repeated"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be measured and what it costs; end")
    group = parser.add_argument_group("models")
    group.add_argument("--weights", metavar="FOLDER", help="folder or hub name as BestWishYsh/HeliosBench-Weights")
    group.add_argument("--judge", metavar="URL", help=f"OpenAI-compatible endpoint; its key is in {judge.KEY}")
    group.add_argument("--judge-model", default=judge.MODEL, metavar="NAME", help=f"[{judge.MODEL}]")
    group.add_argument("--judge-instruction", type=path_argument, metavar="FILE", help="a text in place of our own")
    group.add_argument("--judge-threads", type=count, default=8, metavar="N", help="requests at a time [8]")
    group.add_argument("--judge-price", type=float, metavar="DOLLARS", help="of a million tokens of input, to estimate")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    try:
        return run(make_parser().parse_args(argv), sys.argv[1:] if argv is None else list(argv))
    except (ValueError, FileNotFoundError, SetupError) as error:
        warn(str(error))
        return 2
    except JudgeError as error:
        warn(str(error))
        return 1
    except OSError as error:
        warn(f"{error}; the same command goes on")
        return 1


def run(args: argparse.Namespace, argv: list[str]) -> int:
    """Judges what `args` say; returns the exit code."""
    out: Path = args.out
    check_locations(local=True, **{"--out": str(out)}, **{f"videos {i}": str(x) for i, x in enumerate(args.videos)})
    view = View(args.length, frame_size(args.size))
    if args.overlap and args.chunk < 2:
        raise ValueError(f"--overlap needs chunks of 2 frames or more, got --chunk {args.chunk}")
    prompts = read_prompts(args.prompts)
    found = {}
    for folder in args.videos:
        name = folder.resolve().name
        if name in found:
            raise ConfigError(f"{folder}: two folders are named {name}; results go by that name, rename one")
        found[name], left_out = find_videos(folder, prompts)
        for line in left_out:
            warn(f"{folder}: left out: {line}")
    weights = None if args.weights is None else model_files.open_folder(args.weights)
    needs = Needs(weights, _judge(args), args.chunk, args.overlap)
    recipes, missing = make_recipes(args.metrics, needs, view)
    check_folder(out)
    models = [bench_run.open_model(name, out, videos, view) for name, videos in found.items()]
    tasks = bench_run.pending(models, recipes)
    fps = _speeds(args.fps, found)
    for name, reason in missing.items():
        warn(f"{name}: missing: {reason}")
    _tell(tasks, models, needs, view, args.judge_price)
    if args.dry_run:
        return 0
    workers = args.workers or (1 if args.weights else min(LOCAL_WORKERS, os.cpu_count() or 1))
    failed = bench_run.run_tasks(tasks, view, workers, args.judge_threads)
    for name, reason in failed.items():
        warn(f"{name}: skipped: {reason}")
    merged = bench_run.write_results(models, prompts, view, args.strict_upstream)
    result_files.write(out / result_files.ALL_MODELS, result_files.merge_models(merged))
    BenchReport(out, view, models, merged, failed, f"{PROG} {' '.join(argv)}", fps).write(out / "report.html")
    if len(models) == 1 and not failed:
        table_scores.write(models[0], out)
    for name, one in merged.items():
        speed = f", throughput {rating.throughput_score(fps[name])}" if name in fps else ""
        print(_summary(name, one["summary"], view) + speed)
    print(f"report: {out / 'report.html'}")
    return 1 if failed else 0


def _judge(args: argparse.Namespace) -> Judge | None:
    if args.judge is None:
        return None
    instruction = judge.INSTRUCTION
    if args.judge_instruction is not None:
        instruction = judge.read_instruction(args.judge_instruction)
    try:
        return Judge(args.judge, args.judge_model, instruction)
    except MissingError as error:  # it was asked for
        raise ConfigError(f"--judge: {error}") from None


def _tell(
    tasks: Sequence[Task], models: Sequence[bench_run.Model], needs: Needs, view: View, price: float | None
) -> None:
    """Says how much there is to do, and what the judge will be asked."""
    videos = sum(len(model.videos) for model in models)
    local = sum(not task.recipes[0].remote for task in tasks)
    print(f"{videos} videos, of which {local} are to be measured")
    if needs.judge is not None:
        remote = len(tasks) - local
        samples = naturalness.samples(Clip("", 1440, view.length))
        words = len(needs.judge.instruction.split())
        counts = remote * len(samples), remote * sum(map(len, samples))
        print(f"judge {needs.judge.model}: {judge.estimate(*counts, words, price)}", flush=True)


def _summary(name: str, summary: dict, view: View) -> str:
    ratings = result_files.ratings(summary)
    missing = result_files.missing(summary, view.length)
    kind = f"partial, without {', '.join(missing)}" if missing else "complete"
    each = ", ".join(f"{metric} {value}" for metric, value in ratings.items())
    return f"{name}: total {summary['total_weighted_rating']} ({kind}); {each}"


def _speeds(texts: Sequence[str], names: Collection[str]) -> dict[str, float]:
    """The speeds of --fps by model."""
    speeds = {}
    for text in texts:
        name, _, value = text.rpartition("=")
        try:
            speeds[name] = float(value)
        except ValueError:
            speeds[name] = 0.0
        if name not in names or not 0 < speeds[name] < float("inf"):
            raise ConfigError(f"--fps: {text} must read NAME=FPS, with a name of {', '.join(names)}, as in ours=19.5")
    return speeds
