"""Compares the kernels on the GPU or TPU at hand with their references: values and gradients, as compiled.

    python -m pallas_kernels.tools.check              # all ops, some minutes
    python -m pallas_kernels.tools.check attention    # or some

One token, lengths that no block divides, 32760 tokens; bfloat16 and float32. The references run by XLA in float32.
Each kernel runs three times with the same inputs: results that move are a race. Prints a line for each case, and goes
on after one that fails or hangs. Exits with 1 if a kernel is wrong or does not run, with 2 where there are none.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.core import device
from pallas_kernels.tools import isolated
from pallas_kernels.tools.case import DTYPES, Case
from pallas_kernels.tools.tunable import add_line, distance, modules, word

STILL = 0.1  # share of the tolerance that results may move between runs: XLA's sums over rows have no fixed order
RUNS = 3
LIMIT = 90  # seconds


def cases() -> Iterator[Case]:
    """The cases of every op that has a module `cases`, sorted by name.

    Makes no array: only the process that runs the cases uses the device.
    """
    for module in modules("cases"):
        yield from module.cases()


def measure(case: Case) -> dict[str, Any]:
    """Runs a case: `error`, `moved` and the `verdict`, or `why` it did not run; and the `seconds` it took.

    `error` is the largest `tunable.distance` of values and gradients from the reference's in float32 at the same
    inputs, `moved` that of later runs from the first.
    """
    begin = time.monotonic()
    try:
        found, moved = _error(case)
    except Exception as failure:  # an exception of a case becomes its row, and the other cases run
        result = {"why": word(failure)}
    else:
        allowed = case.allowed or DTYPES[case.dtype]
        verdict = "wrong" if found >= allowed else "moves" if moved >= STILL * allowed else "ok"
        result = {"error": found, "moved": moved, "verdict": verdict}
    return result | {"seconds": time.monotonic() - begin}


def _error(case: Case) -> tuple[float, float]:
    shapes = [(shape, case.dtype) for shape in case.tokens] + [(shape, "float32") for shape in case.others]
    inputs = tuple(
        jax.random.normal(key, shape, dtype)
        for key, (shape, dtype) in zip(jax.random.split(jax.random.key(0), len(shapes)), shapes)
    )

    # Random, so that sums over tokens do not cancel, and rounded once for both sides.
    values = jax.eval_shape(case.ours, *inputs)
    leaves, structure = jax.tree.flatten(values)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    cotangents = structure.unflatten(jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, leaves))

    def run(function: Callable[..., Any], inputs: tuple[jax.Array, ...], cotangents: Any) -> Any:
        values, gradients = jax.vjp(function, *inputs)
        return values, gradients(jax.tree.map(lambda c, x: c.astype(x.dtype), cotangents, values))

    with jax.default_matmul_precision("highest" if case.dtype == "float32" else None):
        program = jax.jit(partial(run, case.ours))
        ours = program(inputs, cotangents)
        moved = max(distance(program(inputs, cotangents), ours) for _ in range(RUNS - 1))
    with jax.default_matmul_precision("highest"):
        exact = tuple(x.astype(jnp.float32) for x in inputs)
        theirs = jax.jit(partial(run, case.reference))(exact, cotangents)
    return distance(ours, theirs), moved


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    every = list(cases())
    ops = list(dict.fromkeys(case.op for case in every))
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.tools.check", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("ops", nargs="*", metavar="op", help=", ".join(ops))
    parser.add_argument(
        "--limit", type=isolated.limit, default=LIMIT, metavar="SECONDS",
        help="of a case, which runs in another process; 0 runs all in this one (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="add a line for each case to this file")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if unknown := [op for op in options.ops if op not in ops]:
        print(f"check: there is no op {unknown[0]!r}; there are {', '.join(ops)}", file=sys.stderr)
        return 2

    def job(number: int) -> isolated.Answer:
        return measure(every[number])

    def greeting() -> isolated.Answer:
        return {"platform": device.platform(), "device": device.kind()}

    if options.worker:
        isolated.serve(greeting(), job)
        return 0
    command = [sys.executable, "-m", "pallas_kernels.tools.check", "--worker"]
    with closing(isolated.Apart(command) if options.limit else isolated.Here(greeting(), job)) as jobs:
        if jobs.greeting["platform"] == "cpu":
            print("check: there is nothing to check on a CPU: kernels run on GPUs and TPUs", file=sys.stderr)
            return 2
        print(f"{jobs.greeting['device']}, jax {jax.__version__}")
        wrong = 0
        for number, case in enumerate(every):
            if case.op not in (options.ops or ops):
                continue
            result = jobs.ask(number, options.limit)
            verdict = f"failed: {result['why']}" if "why" in result else _figures(result)
            wrong += result.get("verdict") != "ok"
            print(f"{case.op:16} {case.dtype:10} {case.what:48} {verdict}", flush=True)
            if options.json is not None:
                facts = {"phase": "check", "op": case.op, "dtype": case.dtype, "what": case.what}
                add_line(options.json, facts | result)
    print("all are right" if not wrong else f"{wrong} are not right")
    return int(bool(wrong))


def _figures(result: dict[str, Any]) -> str:
    moved = f", moves by {result['moved']:.1e}" if result["moved"] else ""
    return f"{result['error']:8.1e}{moved}  {result['verdict']}"


if __name__ == "__main__":
    sys.exit(main())
