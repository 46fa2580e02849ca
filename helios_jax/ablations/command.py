"""Runs a table of ablations: python -m helios_jax.ablations TABLE.yaml --out FOLDER."""

import importlib.util
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from helios_jax.ablations import page, queue, scores
from helios_jax.ablations.scores import Scores
from helios_jax.ablations.table import Job, Jobs, Table, read
from helios_jax.config import ConfigError
from helios_jax.locations import check_locations
from helios_jax.path_checks import check_folder
from helios_jax.runtime import interrupts, many
from helios_jax.runtime.command import Parser, count

PROG = "python -m helios_jax.ablations"


def make_parser() -> Parser:
    parser = Parser(
        prog=PROG,
        description="Run a table of ablations, score its rows, and write a page that says how each claim came out.",
        epilog="The same command goes on where it was stopped. docs/ablations.md explains tables and pages."
        " exit codes: 0 all rows have a result, 1 some jobs failed or the page lacks something, 2 input that cannot be"
        " used.",
    )
    parser.add_argument("table", help="a YAML file, or its name in configs/, such as ablations/quick")
    parser.add_argument(
        "--out", required=True, metavar="FOLDER", help="local folder of all jobs; keep it, and jobs are not repeated"
    )
    parser.add_argument(
        "--page", metavar="FILE.md", help="local Markdown file to write [OUT/page.md]; other files go beside it"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--parallel", type=count, default=1, metavar="N", help="jobs at a time on this machine [1]")
    where.add_argument("--ray", metavar="ADDRESS", help="Ray cluster that runs the jobs (docs/pods.md)")
    parser.add_argument("--ray-worker", metavar="NAME=NUMBER", help="what each job needs there, such as GPU=8 [GPU=1]")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="only these rows")
    parser.add_argument(
        "--seeds", nargs="+", type=int, metavar="SEED", help="only these seeds, in place of the table's"
    )
    parser.add_argument("--list", action="store_true", help="print the commands of all jobs, and run none")
    parser.add_argument("--wandb", metavar="PROJECT", help="also send the means of each row to Weights & Biases")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    try:
        args = make_parser().parse_args(argv)
        check_locations(local=True, **{"--out": args.out, "--page": args.page})
        out = Path(os.path.expanduser(args.out)).absolute()
        path = out / "page.md" if args.page is None else Path(os.path.expanduser(args.page))
        table = read(args.table).of(args.rows, args.seeds)
        for name, needed in {"wandb": args.wandb, "matplotlib": table.options.curves}.items():
            if needed and importlib.util.find_spec(name) is None:
                raise ConfigError(
                    f"{args.table}: the package {name} is not installed; pip install {name}, or leave it out"
                )
        jobs = Jobs(table, out)
        wanted = {(row, seed): jobs(row, seed) for row in table.rows for seed in table.options.seeds}
        if args.list:
            waiting = queue.to_do(jobs.in_order, {*wanted.values()})
            for job in jobs.in_order:
                state = "done" if queue.done(job) else "to do" if job in waiting else "not needed"
                print(f"{state}: {job.name}: {shlex.join(job.command)}")
            return 0
        cluster = many.cluster(args.ray, args.ray_worker)
        check_folder(out)
        page.check(table, path)
        if cluster is None:
            failed = queue.run(jobs.in_order, {*wanted.values()}, args.parallel)
        else:
            failed = queue.run_on(cluster, jobs.in_order, {*wanted.values()}, out)
        command = shlex.join([*PROG.split(), *(sys.argv[1:] if argv is None else argv)])
        return _report(table, wanted, failed, path, command, args.wandb)
    except interrupts.Interrupted:
        return interrupts.EXIT_CODE
    except (ConfigError, ValueError, OSError) as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 2


def _report(
    table: Table,
    wanted: Mapping[tuple[str, int], Job],
    failed: Mapping[Job, str],
    path: Path,
    command: str,
    wandb: str | None,
) -> int:
    """Writes the page; returns the exit code."""
    results: dict[str, dict[int, Scores]] = {row: {} for row in table.rows}
    missing: dict[str, str] = {}
    for (row, seed), job in wanted.items():
        try:
            if job in failed:
                missing[f"{row}, seed {seed}"] = failed[job]
            else:
                results[row][seed] = scores.read(job.folder)
        except scores.ScoreError as error:
            missing[f"{row}, seed {seed}"] = str(error)
    written = page.write(table, results, path, command, missing)
    for one in written.outcomes:
        print(f"{one.word}: {one.claim.says}. {one.told}.")
    if written.undecided:
        print(f"{len(written.undecided)} claims are left out, which compare rows that --rows leaves out")
    if wandb is not None:
        page.send(table, results, wandb)
    print(f"wrote {path}")
    for name, reason in missing.items():
        print(f"{PROG}: no result: {name}: {reason}", file=sys.stderr)
    for reason in written.lacks:
        print(f"{PROG}: missing on the page: {reason}", file=sys.stderr)
    return 1 if missing or written.lacks else 0
