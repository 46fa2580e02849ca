"""The planner's command: does a training step fit a machine, how fast would it be, and with which settings?

    python -m helios_jax.plan configs/stage1_init.yaml --topology v6e-256
    python -m helios_jax.plan configs/stage1_init.yaml --topology v5p-128 mesh.fsdp=64 optim.accumulate=4
    python -m helios_jax.plan configs/stage2_init.yaml --topology H100x8 --quick

Without mesh.* settings it also looks for a mesh, and for accumulation and remat policy where these are not given, and
compiles the best.
"""

import argparse
import logging
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from helios_jax import config as configs
from helios_jax.config import ConfigError
from helios_jax.planner import cost, hlo, program, search
from helios_jax.planner.analytic import Memory, Work, arguments
from helios_jax.planner.machines import EXAMPLES, Machine, machine
from helios_jax.planner.report import Answer, page, remedies
from helios_jax.planner.search import Candidate
from helios_jax.runtime import aot
from helios_jax.runtime.command import Parser, count
from helios_jax.runtime.memory import is_kernel_too_large, is_out_of_memory

PROG = "python -m helios_jax.plan"
SHOWN = 5  # estimated settings of a page
CODES = "exit codes: 0 it fits, 1 it does not, 2 input that cannot be used"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    logging.getLogger("jax").setLevel(logging.ERROR)  # it would warn of TPUs that are not here
    try:
        args = make_parser().parse_intermixed_args(argv)
        rented = machine(args.topology)
        return plan(args, Work.of(program.open_config(args.config, args.overrides)), rented)
    except ConfigError as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 2


def make_parser() -> Parser:
    """The parser; its help says what the names of machines are."""
    parser = Parser(
        prog=PROG,
        usage="%(prog)s CONFIG [key=value ...] --topology MACHINE [--quick] [--compile N] [--all-effort]",
        description="Say before renting: does a training step fit, how fast would it be, and with which settings?",
        epilog=f"machines: {EXAMPLES}. {CODES}.",
    )
    parser.add_argument("config", help="a YAML file of configs/, or its name there")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the config, as in mesh.fsdp=64")
    parser.add_argument(
        "--topology", required=True, metavar="MACHINE", help="as it is rented, such as v6e-256 or H100x8"
    )
    parser.add_argument("--quick", action="store_true", help="estimate only: seconds, and no compiler is needed")
    parser.add_argument(
        "--compile", type=count, default=1, metavar="N", help="best settings to compile, a minute or more each [1]"
    )
    parser.add_argument(
        "--all-effort",
        action="store_true",
        help="compile as train.py does, in minutes, and take libtpu's own estimates of time",
    )
    return parser


def plan(args: argparse.Namespace, work: Work, rented: Machine) -> int:
    """Prints the page; returns the exit code."""
    typed = configs.keys(args.overrides)
    fixed = any(key.partition(".")[0] == "mesh" for key in typed)
    kept = typed & {search.ACCUMULATE, search.REMAT}
    found = [search.given(work, rented)] if fixed else search.search(work, rented, kept)
    count = 0 if args.quick else args.compile
    tried = [compiled(work, one, rented, args.all_effort) for one in found[:count]]
    rest = [Answer(one, one.memory, one.cost, False) for one in found[count : max(SHOWN, count + 1)]]
    # Compiled settings come first: those that fit, by expected time. Estimates follow.
    best, *others = [*sorted(tried, key=lambda one: (not one.fits(rented), one.cost.seconds)), *rest]
    print(page(Path(args.config).stem, work, rented, best, others, len(found)))
    if best.fits(rented):
        return 0
    candidates = search.search(work, rented) if fixed or kept else others
    fitting = [one for one in candidates if one.fits(rented)]
    settings = next(iter(fitting), None)
    settings = settings.candidate if isinstance(settings, Answer) else settings
    print(f"{PROG}: {remedies(rented, best, settings)}", file=sys.stderr)
    return 1


def compiled(work: Work, one: Candidate, rented: Machine, all_effort: bool) -> Answer:
    """Compiles a candidate's step; where it does not fit in memory, its time stays the estimate."""
    mesh, begin = search.real_mesh(one, rented), time.monotonic()
    kinds: dict[str, Any] = arguments(work, one.config, mesh)
    given = sum(kinds.values())
    try:
        step = program.compiled(one.config, work.state, mesh, all_effort=all_effort)
    except jax.errors.JaxRuntimeError as error:
        if is_kernel_too_large(error):
            name = re.search(r"for %(\w+)", str(error))
            kernel = name[1] if name else "a kernel"
            raise ConfigError(
                f"{kernel}: its blocks need more on-chip memory than a {rented.chip.name} has; make them smaller in "
                "pallas_kernels/core/tiles.json, or take fewer samples at a time (optim.accumulate)"
            ) from None
        if not is_out_of_memory(error):
            raise
        used = re.search(r"temporaries \(([\d.]+)G\)", str(error))
        temporaries = float(used[1]) * 2**30 if used else one.memory.temporaries
        memory = Memory(**kinds, temporaries=max(temporaries, rented.chip.memory + 1 - given))
        return Answer(one, memory, one.cost, True, seconds=time.monotonic() - begin)
    needed = aot.memory(step)
    memory = Memory(**kinds, temporaries=needed.peak - given)
    spent = cost.cost(hlo.parse(step.as_text()), rented, list(mesh.devices.flat), cycles=all_effort and rented.is_tpu)
    return Answer(one, memory, spent, True, needed.host, time.monotonic() - begin)
