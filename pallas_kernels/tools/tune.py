"""Times an op's kernel with every block size that may do, on the device at hand, beside other ways to compute the same.

    python -m pallas_kernels.tools.tune attention                       # the 14B model's shape
    python -m pallas_kernels.tools.tune attention --shape n=8640 b=2    # another
    python -m pallas_kernels.tools.tune attention --write               # and the fastest go into tiles.json

Sizes with which the kernel does not compile, hangs, or differs from the first row that ran, are left out and the table
says why.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import jax

from pallas_kernels.core import device, tiles
from pallas_kernels.core.tiles import Tiles
from pallas_kernels.tools import isolated
from pallas_kernels.tools.tunable import Op, Shape, add_line, distance, modules, seconds, word

OPS: dict[str, Op] = {name: op for module in modules("tuning") for name, op in module.OPS.items()}


LIMIT = 60  # seconds


@dataclass(frozen=True)
class Result:
    """`seconds` of a call, or `why` there are none. `sizes` are the kernel's; alternatives have none."""

    name: str
    sizes: Tiles | None
    seconds: float | None
    why: str = ""


class Trials:
    """The alternatives to an op's kernel, then its candidates, in the order of timing."""

    def __init__(self, op: Op, shape: Shape, platform: str, *, short: bool = False):
        self.op, self.shape = op, shape
        others = op.alternatives(platform)
        if short:  # kernels are checked against the first
            others = dict(list(others.items())[:1])
        self._functions = [(name, None, function) for name, function in others.items()]
        self._functions += [(_label(sizes), sizes, op.kernel(sizes)) for sizes in op.candidates(platform, shape)]
        self.names = [(name, sizes) for name, sizes, _ in self._functions]

        self._expected: Any = None  # kernels are compared with these

    @cached_property
    def _arguments(self) -> Any:
        return self.op.arguments(self.shape)

    def measure(self, number: int) -> Result:
        """Times one trial; an exception becomes its result."""
        name, sizes, function = self._functions[number]
        try:
            timed, arguments, got = self._run(function)
            if self._expected is None:
                self._expected = self._first_before(number, got)
            if distance(got, self._expected) > self.op.tolerance:
                return Result(name, sizes, None, "wrong")
            return Result(name, sizes, seconds(timed, *arguments))
        except Exception as error:
            return Result(name, sizes, None, word(error))

    def _run(self, function: Callable[..., Any]) -> tuple[Callable[..., Any], tuple[Any, ...], Any]:
        timed, arguments = self.op.prepared(function, self._arguments)
        return timed, arguments, jax.block_until_ready(jax.jit(timed)(*arguments))

    def _first_before(self, number: int, got: Any) -> Any:
        """The result of the first trial that runs; `got` is the result of trial `number`."""
        for _, _, function in self._functions[:number]:
            try:
                return self._run(function)[2]
            except Exception:  # its own row holds the reason
                continue
        return got


def fastest(results: Iterable[Result]) -> Result | None:
    """The kernel's fastest trial; the first on a tie."""
    timed = [result for result in results if result.sizes is not None and result.seconds is not None]
    return min(timed, key=lambda result: result.seconds or 0.0, default=None)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.tools.tune", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("op", help=", ".join(OPS))
    parser.add_argument("--shape", nargs="+", default=[], metavar="AXIS=SIZE", help="other sizes than the 14B model's")
    parser.add_argument("--write", action="store_true", help="put the fastest sizes into tiles.json")
    parser.add_argument("--short", action="store_true", help="beside the first alternative only")
    parser.add_argument(
        "--limit", type=isolated.limit, default=LIMIT, metavar="SECONDS",
        help="of one row, which runs in another process; 0 runs all in this one (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="add a line for each row to this file")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.op not in OPS:
        sys.exit(f"tune: there is no op {options.op!r}; there are {', '.join(OPS)}")
    op = OPS[options.op]
    shape = op.axes | _shape(op, options.shape)
    odd = [axis for axis in op.fixed if shape[axis] != op.axes[axis]]
    if options.write and odd:
        usual = ", ".join(f"{axis}={op.axes[axis]}" for axis in odd)
        sys.exit(f"tune: tiles.json is for {usual}: leave {', '.join(odd)} out of --shape, or leave out --write")

    def trials(platform: str) -> Trials:
        return Trials(op, shape, platform, short=options.short)

    if options.worker:
        here = cache(trials)
        return isolated.serve(_greeting(), lambda number: vars(here(device.platform()).measure(number)))
    if options.limit:
        given = [options.op, *["--short"] * options.short, "--shape", *(f"{a}={size}" for a, size in shape.items())]
        jobs = isolated.Apart([sys.executable, "-m", "pallas_kernels.tools.tune", *given, "--worker"])
    else:
        jobs = isolated.Here(_greeting(), lambda number: vars(tried.measure(number)))
    platform, kind = jobs.greeting["platform"], jobs.greeting["device"]
    with closing(jobs):
        if platform == "cpu":
            print("tune: there is nothing to tune on a CPU: kernels run on GPUs and TPUs", file=sys.stderr)
            sys.exit(2)
        if not op.candidates(platform, shape):
            sys.exit(f"tune: {options.op} has no kernel of its own on a {platform.upper()}, so no sizes")
        tried, results = trials(platform), []
        sizes = " ".join(f"{axis}={size}" for axis, size in shape.items())
        print(f"{options.op}, {sizes}, on {kind} (jax {jax.__version__})")
        for number, (name, chosen) in enumerate(tried.names):
            answer = jobs.ask(number, options.limit)
            result = Result(name, chosen, answer.get("seconds"), answer.get("why", ""))
            results.append(result)
            print(row(op, shape, result), flush=True)
            if options.json is not None:
                facts = {"phase": "tune", "op": options.op, "device": kind, "length": shape[op.length]}
                add_line(options.json, facts | vars(result))
    best = fastest(results)
    if best is None:
        sys.exit(f"tune: no sizes of {options.op} ran here")
    print(f"fastest: {best.name}")
    if options.write:
        tiles.write(options.op, kind, shape[op.length], best.sizes or {})
        print(f"written to {tiles.PATH} for {kind}, {op.length} up to {shape[op.length]}")


def _greeting() -> isolated.Answer:
    return {"platform": device.platform(), "device": device.kind()}


def row(op: Op, shape: Shape, result: Result) -> str:
    """A line of the table: seconds and TFLOP/s or GB/s, or the reason for none."""
    if result.seconds is None:
        return f"{result.name:48} {result.why}"
    scale, unit = (1e12, "TFLOP/s") if op.unit == "FLOP" else (1e9, "GB/s")
    return f"{result.name:48} {result.seconds:10.6f} s {op.work(shape) / result.seconds / scale:9.1f} {unit}"


def _shape(op: Op, given: list[str]) -> Shape:
    shape = {}
    for item in given:
        axis, _, size = item.partition("=")
        if axis not in op.axes or not size.isdecimal() or int(size) == 0:
            sys.exit(f"tune: --shape takes {' '.join(f'{axis}=SIZE' for axis in op.axes)}, not {item!r}")
        shape[axis] = int(size)
    return shape


def _label(sizes: Tiles) -> str:
    return " ".join(f"{name}={size}" for name, size in sizes.items())


if __name__ == "__main__":
    main()
