"""Times an op's kernel with every block size that may do, on the device at hand, beside other ways to compute the same.

    python -m pallas_kernels.tune attention                       # the 14B model's shape
    python -m pallas_kernels.tune attention --shape n=8640 b=2    # another
    python -m pallas_kernels.tune attention --write               # and the fastest go into tiles.json

Sizes with which the kernel does not compile, or differs from the first row that ran, are left out and the table says
why.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax

from pallas_kernels import device, tiles, tune_attention, tune_norms
from pallas_kernels.tiles import Tiles
from pallas_kernels.tunable import Op, Shape, distance, seconds, word

OPS: dict[str, Op] = {**tune_attention.OPS, **tune_norms.OPS}


@dataclass(frozen=True)
class Result:
    """`seconds` of a call, or `why` there are none. `sizes` are those of the kernel; alternatives have none."""

    name: str
    sizes: Tiles | None
    seconds: float | None
    why: str = ""


def measure(op: Op, shape: Shape, report: Callable[[Result], None]) -> list[Result]:
    """Times the alternatives and then every candidate, and tells `report` of each as it is done."""
    arguments, results = op.arguments(shape), []
    expected: Any = None
    entries = [(name, None, function) for name, function in op.alternatives(device.platform()).items()]
    entries += [(_label(sizes), sizes, op.kernel(sizes)) for sizes in op.candidates(device.platform(), shape)]
    for name, sizes, function in entries:
        try:
            timed = op.prepared(function, arguments)
            got = jax.block_until_ready(jax.jit(timed[0])(*timed[1]))
            expected = got if expected is None else expected
            wrong = distance(got, expected) > op.tolerance
            result = Result(name, sizes, None, "wrong") if wrong else Result(name, sizes, seconds(timed[0], *timed[1]))
        except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
            result = Result(name, sizes, None, word(error))
        results.append(result)
        report(result)
    return results


def fastest(results: Iterable[Result]) -> Result | None:
    """The kernel's fastest; the first of equals."""
    timed = [result for result in results if result.sizes is not None and result.seconds is not None]
    return min(timed, key=lambda result: result.seconds or 0.0, default=None)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.tune", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("op", help=", ".join(OPS))
    parser.add_argument("--shape", nargs="+", default=[], metavar="AXIS=SIZE", help="other sizes than the 14B model's")
    parser.add_argument("--write", action="store_true", help="put the fastest sizes into tiles.json")
    options = parser.parse_args(arguments)
    if options.op not in OPS:
        sys.exit(f"tune: there is no op {options.op!r}; there are {', '.join(OPS)}")
    op = OPS[options.op]
    shape = op.axes | _shape(op, options.shape)
    odd = [axis for axis in op.fixed if shape[axis] != op.axes[axis]]
    if options.write and odd:
        usual = ", ".join(f"{axis}={op.axes[axis]}" for axis in odd)
        sys.exit(f"tune: tiles.json is for {usual}: leave {', '.join(odd)} out of --shape, or leave out --write")
    platform, kind = device.platform(), device.kind()
    if platform == "cpu":
        print("tune: there is nothing to tune on a CPU: kernels run on GPUs and TPUs", file=sys.stderr)
        sys.exit(2)
    if not op.candidates(platform, shape):
        sys.exit(f"tune: {options.op} has no kernel of its own on a {platform.upper()}, so no sizes")

    sizes = " ".join(f"{axis}={size}" for axis, size in shape.items())
    print(f"{options.op}, {sizes}, on {kind} (jax {jax.__version__})")
    best = fastest(measure(op, shape, lambda result: print(row(op, shape, result), flush=True)))
    if best is None:
        sys.exit(f"tune: no sizes of {options.op} ran here")
    print(f"fastest: {best.name}")
    if options.write:
        tiles.write(options.op, kind, shape[op.length], best.sizes or {})
        print(f"written to {tiles.PATH} for {kind}, {op.length} up to {shape[op.length]}")


def row(op: Op, shape: Shape, result: Result) -> str:
    """A line of the table: seconds and TFLOP/s or GB/s, or why not."""
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
