"""Time of a compiled program on a machine: the roofline of each instruction, and the collectives that nothing hides.

The bound assumes every product at the chip's peak and every byte at its full bandwidth. The expected time uses the
shares of both that programs reach (`Chip.efficiency`), or libtpu's own estimates of cycles where the program was
compiled with all effort. With little effort, libtpu does not look for good tiles and estimates the cycles of bad ones.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from helios_jax.planner import hlo_flops
from helios_jax.planner.collectives import Collective, collective
from helios_jax.planner.hlo import Computation, Instruction, Module
from helios_jax.planner.machines import Machine
from helios_jax.planner.traffic import traffic

PARTS = ("products", "attention", "memory", "collectives")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


def sums() -> dict[str, float]:
    """Sums by name, 0 at first."""
    return defaultdict(float)


@dataclass
class Cost:
    """Sums over a program on one device, with the body of a loop counted as often as it runs.

    `bound` and `expected` are seconds by part, of PARTS; `hidden` is the time of collectives that other work hides.
    `flops` are by kind of product or kernel, `unknown` names kernels whose operations are not known. Collectives are by
    kind: `runs`, `received` bytes, and the `overlapped` bytes of those that run beside other work.
    """

    flops: dict[str, float] = field(default_factory=sums)
    bytes: dict[str, float] = field(default_factory=sums)
    bound: dict[str, float] = field(default_factory=sums)
    expected: dict[str, float] = field(default_factory=sums)
    hidden: dict[str, float] = field(default_factory=sums)
    runs: dict[str, float] = field(default_factory=sums)
    received: dict[str, float] = field(default_factory=sums)
    overlapped: dict[str, float] = field(default_factory=sums)
    unknown: dict[str, float] = field(default_factory=sums)

    def add(self, other: "Cost", times: int = 1) -> None:
        for name, sums in vars(other).items():
            mine = getattr(self, name)
            for key, value in sums.items():
                mine[key] += value * times

    @property
    def seconds(self) -> float:
        return sum(self.expected.values())

    @property
    def roofline(self) -> float:
        return sum(self.bound.values())


@dataclass(frozen=True)
class _Model:
    """Inputs of the cost of an instruction that are the same for all instructions."""

    module: Module
    machine: Machine
    order: Sequence[Any]  # the mesh's devices
    cycles: bool  # take the compiler's estimates


def cost(module: Module, machine: Machine, order: Sequence[Any], *, cycles: bool = False) -> Cost:
    """The cost of one run; of a conditional's branches the most expensive. `cycles` trusts the compiler's estimates."""
    return _computation(module.computations[module.entry], _Model(module, machine, order, cycles))


def _computation(computation: Computation, model: _Model) -> Cost:
    total = Cost()
    waited: dict[str, tuple[Collective, float]] = {}  # by the instruction that waits: seconds of work at the start
    for one in computation.instructions.values():
        if one.name in waited:
            _finish(total, *waited.pop(one.name), model)
        found = collective(model.module, computation, one)
        if found is not None:
            total.runs[found.kind] += 1
            total.received[found.kind] += found.received
            if found.done is None:
                _finish(total, found, None, model)
            else:
                waited[found.done] = (found, _work(total))
        else:
            total.add(_instruction(computation, one, model))
    return total


def _work(total: Cost) -> float:
    return sum(seconds for part, seconds in total.expected.items() if part != "collectives")


def _finish(total: Cost, found: Collective, before: float | None, model: _Model) -> None:
    """Adds the time of a collective that the work since its start does not hide.

    `before` is the seconds of work at its start; None for a collective that the device waits for at once.
    """
    seconds = found.received / model.machine.link_rate(found.group, model.order)
    hidden = 0.0 if before is None else min(seconds, _work(total) - before)
    if hidden > 0:
        total.overlapped[found.kind] += found.received
        total.hidden["collectives"] += hidden
    total.bound["collectives"] += seconds - hidden
    total.expected["collectives"] += seconds - hidden


def _instruction(computation: Computation, one: Instruction, model: _Model) -> Cost:
    module = model.module
    if one.opcode == "while":
        total = Cost()
        trips = module.trips(one)
        for part in ("condition", "body"):
            total.add(_computation(module.computations[one.attribute(part) or ""], model), trips or 1)
        if trips is None:
            total.unknown["loops whose length the program does not tell, counted once"] += 1
        return total
    if one.opcode == "conditional":
        branches = [_computation(branch, model) for branch in module.branches(one)]
        return max(branches, key=lambda branch: branch.seconds, default=Cost())
    if one.opcode in ("call", "async-start") and (called := module.called(one)) is not None:
        return _computation(called, model)
    return _single(computation, one, model)


def _single(computation: Computation, one: Instruction, model: _Model) -> Cost:
    total, chip = Cost(), model.machine.chip
    flops, moved = hlo_flops.flops(model.module, computation, one), traffic(model.module, computation, one)
    name = hlo_flops.kernel(one)
    if name is not None and not hlo_flops.counted(name):
        total.unknown[f"operations of kernel {name}"] += 1
    total.bytes["main memory"] += moved
    if not flops and not moved:
        return total
    compute, memory = flops / chip.flops, moved / chip.bandwidth
    attention = hlo_flops.is_attention(name)
    if flops:
        total.flops["attention" if attention else "products"] += flops
    if one.opcode == "copy-start":  # into or out of on-chip memory, beside other work
        return total
    products, kernels, streams = chip.efficiency
    bound = max(compute, memory)
    part = "attention" if attention else "products" if compute >= memory else "memory"
    expected = max(compute / (kernels if attention else products), memory / streams)
    found = _CYCLES.search(one.attributes) if model.cycles else None
    total.bound[part] += bound
    total.expected[part] += int(found[1]) / chip.clock if found else expected
    return total
