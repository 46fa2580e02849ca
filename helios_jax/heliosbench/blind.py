"""Compares folders of videos blindly: a static page shows pairs, and says at the end which model won how often.

    python -m helios_jax.heliosbench.blind ours theirs --prompts helios_t2v_prompts.csv --out DIR
    python -m helios_jax.heliosbench.blind --results anna.csv ben.csv --out DIR

The first command writes DIR/index.html, which works from a disk as from any web server. Videos lie beside it under
random names. The second one joins the judgments of several people and writes DIR/win_rates.csv.
"""

import argparse
import base64
import csv
import json
import os
import random
import shutil
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from helios_jax.config import ConfigError
from helios_jax.heliosbench.bench_videos import find_videos, read_prompts
from helios_jax.heliosbench.blind_pairs import Pair, WinRate, Z, draw_pairs, read_judgments, win_rates
from helios_jax.locations import check_locations, path_argument, replacing
from helios_jax.path_checks import check_folder
from helios_jax.runtime.command import Parser, count

PROG = "python -m helios_jax.heliosbench.blind"


def make_parser() -> Parser:
    """The parser."""
    parser = Parser(prog=PROG, description="Compare videos without knowing who made them.", epilog="exit codes: 0, 2")
    parser.add_argument("videos", nargs="*", type=path_argument, help="two folders or more, named as for HeliosBench")
    parser.add_argument("--prompts", type=path_argument, metavar="CSV", help="ids and prompts")
    parser.add_argument("--out", type=path_argument, required=True, metavar="DIR", help="an empty or absent folder")
    parser.add_argument("--pairs", type=count, metavar="N", help="at most this many [all]")
    parser.add_argument("--seed", type=int, default=0, help="of order and sides [0]")
    about = "judgments that the page has saved"
    parser.add_argument("--results", nargs="+", type=path_argument, metavar="CSV", help=about)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    try:
        args = make_parser().parse_args(argv)
        check_locations(local=True, **{"--out": str(args.out)})
        if args.results:
            report(args.results, args.out)
        else:
            make_page(args)
    except (ValueError, FileNotFoundError) as error:
        print(f"blind: {error}", file=sys.stderr)
        return 2
    return 0


def make_page(args: argparse.Namespace) -> None:
    """Writes the page and its videos."""
    if len(args.videos) < 2 or args.prompts is None:
        raise ConfigError("name two folders of videos or more, and their --prompts")
    names = [folder.resolve().name for folder in args.videos]
    if len(set(names)) < len(names):
        raise ConfigError(f"two folders are named {max(names, key=names.count)}; results go by that name, rename one")
    prompts = read_prompts(args.prompts)
    models = {}
    for name, folder in zip(names, args.videos):
        models[name], left_out = find_videos(folder, prompts)
        for line in left_out:
            print(f"blind: {name}: left out: {line}", file=sys.stderr)
    pairs = draw_pairs(models, args.pairs, args.seed)
    check_folder(args.out)
    if any(args.out.iterdir()):
        raise ConfigError(f"--out: {args.out} is not empty; name another folder")
    page = args.out / "index.html"
    write_page(page, pairs)
    fewer = "" if args.pairs in (None, len(pairs)) else f", not {args.pairs}: these are all that the folders share"
    print(f"{len(pairs)} pairs{fewer}: open {page}")


def write_page(path: Path, pairs: Sequence[Pair]) -> None:
    """The page at `path`; videos are linked, or copied across file systems, into `media` beside it."""
    names: dict[Path, str] = {}
    (path.parent / "media").mkdir()
    rng = random.SystemRandom()
    for video in (video for pair in pairs for video in (pair.left, pair.right)):
        if video.path not in names:
            names[video.path] = f"media/{rng.getrandbits(64):016x}{video.path.suffix}"
            _link(video.path, path.parent / names[video.path])
    key = [{"left": pair.left_model, "right": pair.right_model} for pair in pairs]
    data = {
        "name": f"{rng.getrandbits(32):08x}",
        "z": Z,
        # Encoded, so that nobody reads it by accident; the page decodes it for the results.
        "key": base64.b64encode(json.dumps(key).encode()).decode(),
        "pairs": [
            {"id": p.left.id, "prompt": p.left.prompt, "left": names[p.left.path], "right": names[p.right.path]}
            for p in pairs
        ],
    }
    text = files("helios_jax.heliosbench").joinpath("blind.html").read_text(encoding="utf-8")
    script = json.dumps(data, ensure_ascii=False).replace("</", "<\\/")
    with replacing(path) as part:
        part.write_text(text.replace("/*DATA*/null", script), encoding="utf-8")


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def report(paths: Sequence[Path], out: Path) -> None:
    """Prints the win rates over all files of judgments, and writes them."""
    found = win_rates([row for path in paths for row in read_judgments(path)])
    check_folder(out)
    with replacing(out / "win_rates.csv") as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["model", "comparisons", "wins", "ties", "losses", "win_rate", "low", "high"])
        writer.writerows(_cells(one) for one in found)
    for one in found:
        low, high = one.interval
        print(f"{one.model}: {one.rate:.1%} of {one.comparisons} ({low:.1%} to {high:.1%})")


def _cells(one: WinRate) -> list[str | int]:
    rates = (f"{value:.4f}" for value in (one.rate, *one.interval))
    return [one.model, one.comparisons, one.wins, one.ties, one.losses, *rates]


if __name__ == "__main__":
    sys.exit(main())
