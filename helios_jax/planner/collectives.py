"""Collectives of a compiled program: kind, bytes, devices that take part, and the instruction that waits for each."""

import re
from dataclasses import dataclass
from math import prod

import numpy as np

from helios_jax.planner import async_fusions
from helios_jax.planner.hlo import Computation, Instruction, Module

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? ?\{([^}]*)\}")


@dataclass(frozen=True)
class Collective:
    """A collective, of which each device receives `received` bytes in one run; `group` is one group of its devices.

    `start` is the instruction that starts it. `done` is the name of the one that waits for it, None where the device
    waits at once.
    """

    kind: str
    received: float
    group: tuple[int, ...]
    start: Instruction
    done: str | None


def collective(module: Module, computation: Computation, instruction: Instruction) -> Collective | None:
    """The collective that `instruction` starts, or None: other instructions, and groups of one device."""
    source, opcode = instruction, instruction.opcode
    started, part = opcode.endswith("-start"), async_fusions.part(module, instruction)
    if part in ("step", "done"):
        return None
    if opcode == "async-start" or opcode == "fusion":
        inner = module.called(instruction)
        found = [one for one in inner.instructions.values() if one.opcode in KINDS] if inner else []
        if len(found) != 1:
            return None
        source, opcode = found[0], found[0].opcode
    kind = opcode.removesuffix("-start")
    if kind not in KINDS or (opcode.endswith("-done")):
        return None
    group = _group(source.attributes)
    if len(group) < 2:
        return None
    done = _done(computation, instruction, started) if part is None else None
    if part == "start":
        done = async_fusions.done(module, computation, instruction)
    return Collective(kind, _received(kind, source, len(group)), group, instruction, done)


def _received(kind: str, instruction: Instruction, count: int) -> float:
    shapes = instruction.shapes
    if instruction.opcode.endswith("-start") and kind in ("all-gather", "collective-permute"):
        # The result of such a start holds the operands before the outputs, and on TPUs numbers behind them.
        arrays = [shape for shape in shapes if shape.sizes]
        shapes = tuple(arrays[len(arrays) // 2 :])
    size = sum(shape.bytes for shape in shapes)
    others = (count - 1) / count
    factors = {
        "all-gather": others,
        "reduce-scatter": count - 1,  # the result is one of `count` parts
        "all-reduce": 2 * others,
        "all-to-all": others,
        "collective-permute": 1,
    }
    return size * factors[kind]


def _done(computation: Computation, instruction: Instruction, started: bool) -> str | None:
    if not started:
        return None
    name = instruction.name
    while True:  # an asynchronous computation may be updated on its way
        users = [one for one in computation.users[name] if one.opcode.endswith(("-done", "-update"))]
        if not users:
            return None
        if users[0].opcode.endswith("-done"):
            return users[0].name
        name = users[0].name


def _group(attributes: str) -> tuple[int, ...]:
    """The first group of devices, numbered as in the mesh, in any of the three ways that XLA writes them."""
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes):
        return tuple(dict.fromkeys((int(pairs[1]), int(pairs[2]))))
    if mesh := _MESH.search(attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        devices = np.arange(prod(sizes.values()))
        if mesh[2] and (order := re.search(r"\[([\d,]+)\]T\(([\d,]+)\)", mesh[2])):
            devices = devices.reshape(_numbers(order[1])).transpose(_numbers(order[2])).ravel()
        devices = devices.reshape(tuple(sizes.values()))
        along = [i for i, name in enumerate(sizes) if name in re.findall(r"'([^']+)'", mesh[3])]
        first = devices[tuple(slice(None) if i in along else 0 for i in range(len(sizes)))]
        return tuple(int(n) for n in first.ravel())
    found = re.search(r"replica_groups=(\{\{[^}]*\}|\[\S+)", attributes)
    if found is None:
        return ()
    if iota := _IOTA.match(found[1]):
        groups, sizes = _numbers(iota[1]), _numbers(iota[2])
        devices = np.arange(prod(sizes)).reshape(sizes)
        if iota[3]:
            devices = devices.transpose(_numbers(iota[3]))
        return tuple(int(n) for n in devices.reshape(groups)[0])
    return tuple(int(n) for n in re.findall(r"\d+", found[1]))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(","))
