"""The training command: train.py, or helios-train where the package is installed.

The config says what to run; `key=value` arguments override it. Input that cannot be used ends the command with a
one-line message and exit code 2, before the model is built.
"""

import argparse
import logging
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

from helios_jax.config import ConfigError
from helios_jax.messages import one_line
from helios_jax.runtime import interrupts
from helios_jax.runtime.command import Lines, Parser, count, program_name, warnings_as_lines
from helios_jax.runtime.memory import is_out_of_memory, use_gpus_whole
from helios_jax.training.stage_names import STAGES

# Keys that most runs set, with their default in brackets; `docs/training.md` and config.yaml of a run have all.
KEYS = {
    "stage": "one of the above, or the dotted path of a class of yours",
    "run": "folder for everything the run writes [runs/train]",
    "init": "diffusers folder or hub name to start from; null: random weights [null]",
    "steps": "optimiser steps of the whole run [1000]",
    "seed": "seed of weights and noise, 0 to 2^64 - 1 [0]",
    "precision": "bfloat16 or float32, of matrix products [bfloat16]",
    "log_every": "steps between lines of progress [20]",
    "data.folder": "dataset made by python -m helios_jax.precompute [data/toy]",
    "data.batch_size": "samples of a step, over all devices [8]",
    "data.leave_out": "numbers of damaged records, as in [17,40] [[]]",
    "optim.lr": "learning rate [5e-05]",
    "optim.accumulate": "parts that a batch is computed in, to save memory [1]",
    "optim.ema.decay": "decay of the average that is exported; optim.ema=null: none [0.999]",
    "checkpoint.every": "steps between checkpoints [500]",
    "checkpoint.keep": "checkpoints kept on disk [2]",
    "mesh.fsdp": "devices that share the weights [1]",
    "mesh.context": "devices that share the tokens of a sample [1]",
    "mesh.processes": "hosts, each of which runs the same command; null: as many as a TPU pod or Slurm says [1]",
    "stopped_code": "exit code after SIGTERM, by which a scheduler tells a stopped run from one that is done [75]",
}
CODES = {
    0: "done",
    1: "the loss is not finite, a record is damaged, a file cannot be written or read, or no memory is left",
    2: "input that cannot be used",
    75: "ended by SIGTERM after saving (see stopped_code)",
    76: "another host is gone; the same command goes on from the newest checkpoint",
    130: "ended by Ctrl-C after saving, or by a signal before the first step or after the last",
}
LESS_MEMORY = (
    "out of memory: raise optim.accumulate or mesh.fsdp, keep less for the backward pass (remat=block), train adapters"
    " alone, or use devices with more memory"
)
EXAMPLES = (
    "configs/toy/stage1.yaml run=runs/mine steps=200",
    "configs/stage1_init.yaml data.folder=data/latents mesh.fsdp=8 optim.accumulate=8",
)


def _is_no_leftover(record: logging.LogRecord) -> bool:
    """False for further errors of a failed save: its first one is raised, and asyncio logs the others at some time."""
    return "exception was never retrieved" not in record.getMessage()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code, one of CODES."""
    try:
        args = (parser := make_parser()).parse_intermixed_args(argv)
        if args.config is None:
            parser.error("name a config, such as configs/toy/stage1.yaml")
    except ConfigError as error:
        return fail(error, 2)
    use_gpus_whole()
    # After the arguments: jax takes seconds to import.
    from helios_jax.locations import LocationError, location
    from helios_jax.pretrained import CheckpointError
    from helios_jax.runtime import hosts
    from helios_jax.runtime.compilation import enable_cache
    from helios_jax.runtime.host_watch import Watch
    from helios_jax.training.errors import RunError
    from helios_jax.training.run_checkpoints import RestoreError
    from helios_jax.training.stage_table import load_config, make_stage
    from helios_jax.training.trainer import train

    # Replaces the handlers: Orbax adds one when it is imported, which would print each line a second time.
    root, handlers = logging.getLogger(), logging.getLogger().handlers
    root.handlers = [Lines(program_name("train.py"))]
    logging.getLogger("helios_jax").setLevel(logging.INFO)
    logging.getLogger("asyncio").addFilter(_is_no_leftover)
    watch = None

    def end(error: Exception, code: int) -> int:
        if watch is not None:
            watch.end(str(error), code)
        return fail(error, code)

    with warnings_as_lines(program_name("train.py")):
        # Writes that a failed save never began: Python warns of each whenever it is collected.
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        try:
            stage = make_stage(load_config(args.config, args.overrides))
            hosts.join(stage.config.mesh.processes)
            watch = Watch(program_name("train.py")) if hosts.several() else None
            enable_cache(location(stage.config.run).parent / "xla" if watch else None)
            code = train(stage, args.profile)
            if watch is not None:
                watch.close()
            return code
        except RunError as error:
            return end(error, 1)
        except (ConfigError, LocationError, RestoreError, CheckpointError, hosts.JoinError) as error:
            return end(error, 2)
        except Exception as error:
            if is_out_of_memory(error):
                return end(MemoryError(f"{one_line(error)}; {LESS_MEMORY}"), 1)
            if watch is not None:
                watch.find_cause()
                traceback.print_exc()
                watch.end(f"{type(error).__name__}: {one_line(error)}", 1)
            raise
        finally:
            root.handlers = handlers


def make_parser() -> Parser:
    """The parser; its help lists stages, keys, exit codes and examples."""
    prog = program_name("train.py")

    def table(title: str, rows: dict[str, str] | dict[int, str]) -> str:
        width = max(len(str(name)) for name in rows) + 2
        return "\n".join([f"{title}:", *(f"  {name!s:<{width}}{text}" for name, text in rows.items())])

    stages = {name: stage.about for name, stage in STAGES.items()}
    parts = [table("stages (the config's `stage`)", stages), table("keys that most runs set [default]", KEYS)]
    parts += [table("exit codes", CODES), "\n".join(["examples:", *(f"  {prog} {example}" for example in EXAMPLES)])]
    parser = Parser(
        prog=prog,
        usage="%(prog)s CONFIG [key=value ...] [--profile STEPS]",
        description="Train one stage of Helios. The same command continues a run from its newest checkpoint.",
        epilog="\n\n".join(parts),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", nargs="?", help="a YAML file of configs/, or its name there, as in toy/stage1")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the config, as in optim.lr=1e-4")
    about = "record so many steps, from the third on, in RUN/profile"
    parser.add_argument("--profile", type=count, default=0, metavar="STEPS", help=about)
    return parser


def fail(error: Exception, code: int) -> int:
    """Prints the error as one line on stderr; returns the exit code."""
    print(f"{program_name('train.py')}: {error}", file=sys.stderr)
    return code


def entry_point() -> int:
    """Runs `main` as the whole process; returns the exit code.

    After a failed save, threads of Orbax and TensorStore still run. They report further failed writes to an event loop
    that is closed by then, and would print tracebacks while the interpreter exits. These are dropped here: the error
    has been reported already.
    """
    interrupts.install(program_name("train.py"))
    usual = sys.unraisablehook

    def unraisable(found: Any) -> None:
        if str(found.exc_value) != "Event loop is closed":
            usual(found)

    sys.unraisablehook = unraisable
    code = main()
    if code == 1:
        interrupts.leave(code)
    return code
