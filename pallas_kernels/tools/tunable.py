"""An op for the tuner; the seconds of a call on this machine's device, and the error of its result."""

import importlib
import importlib.util
import json
import math
import os
import pkgutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import pallas_kernels
from pallas_kernels.core.tiles import Tiles

Shape = dict[str, int]  # sizes of an op's axes
IN_A_PROGRAM, REPEATS, SPEND = 8, 7, 0.1


@dataclass(frozen=True)
class Op:
    """An op for the tuner.

    axes: the axes of its inputs and their default sizes, which are the 14B model's
    length: the axis whose size is the key of block sizes in tiles.json
    fixed: axes that must have their default sizes for block sizes to be stored
    work: the number of `unit`s of one call: "FLOP", or "B" for bytes that must be read or written at least once
    arguments: makes random inputs on the device
    candidates: block sizes to try on "gpu" or "tpu"; empty if the op has no kernel there
    kernel: makes the op with such sizes, to be called with the arguments
    alternatives: other implementations by name, the most trusted first: kernels are compared with the first that runs
    prepared: replaces a function and its arguments by what is timed, such as the backward pass and its inputs
    tolerance: the largest difference from that alternative, relative to the root mean square of its results
    """

    axes: Shape
    length: str
    fixed: tuple[str, ...]
    work: Callable[[Shape], float]
    unit: str
    arguments: Callable[[Shape], tuple[Any, ...]]
    candidates: Callable[[str, Shape], list[Tiles]]
    kernel: Callable[[Tiles], Callable[..., Any]]
    alternatives: Callable[[str], dict[str, Callable[..., Any]]]
    prepared: Callable[[Callable[..., Any], tuple[Any, ...]], tuple[Callable[..., Any], tuple[Any, ...]]] = (
        lambda function, arguments: (function, arguments)
    )
    tolerance: float = 0.02  # bfloat16 and another order of sums cause a few thousandths


def seconds(function: Callable[..., Any], *arguments: Any) -> float:
    """Seconds of one call of `function`, compiled: the median of several measurements after a first call.

    A measurement queues programs of several calls each, so that the device does not wait for the host.
    """
    program = jax.jit(lambda *arguments: repeated(function, *arguments))

    def measure(programs: int) -> float:
        begin = time.perf_counter()
        out = program(*arguments)
        for _ in range(programs - 1):
            out = program(*arguments)
        jax.block_until_ready(out)
        return (time.perf_counter() - begin) / programs / IN_A_PROGRAM

    measure(1)
    programs = max(1, math.ceil(SPEND / IN_A_PROGRAM / measure(1)))
    return statistics.median(measure(programs) for _ in range(REPEATS))


def repeated(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function` of the same `arguments`, `IN_A_PROGRAM` times over."""

    def again(i: Any, _: Any) -> Any:
        same, _ = lax.optimization_barrier((arguments, i))  # without this, XLA would compute it once, before the loop
        return function(*same)

    return lax.fori_loop(1, IN_A_PROGRAM, again, function(*arguments))


def distance(got: Any, expected: Any) -> float:
    """The largest root mean square of a difference of two arrays, relative to the expected array; infinite for NaN."""
    distances = []
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        apart = float(jnp.linalg.norm((a - b).ravel()) / jnp.maximum(jnp.linalg.norm(b.ravel()), 1e-30))
        distances.append(apart if np.isfinite(apart) else np.inf)
    return max(distances)


def add_line(path: Path, facts: dict[str, Any]) -> None:
    """Adds `facts` to a file of JSON lines, after a line that a killed process may have left unfinished."""
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(facts).encode() + b"\n")


def word(error: Exception) -> str:
    """A short reason why a kernel did not run."""
    message = str(error)
    if "shared memory" in message:
        return "shared memory"
    if "RESOURCE_EXHAUSTED" in message or "out of memory" in message:
        return "memory"
    return f"{type(error).__name__}: {message.splitlines()[0][:70] if message else ''}"


def modules(name: str) -> list[Any]:
    """The module `name` of each op that has one. Ops are the packages besides `core` and `tools`."""
    found = []
    for op in sorted(info.name for info in pkgutil.iter_modules(pallas_kernels.__path__) if info.ispkg):
        if importlib.util.find_spec(f"pallas_kernels.{op}.{name}") is not None:
            found.append(importlib.import_module(f"pallas_kernels.{op}.{name}"))
    return found
