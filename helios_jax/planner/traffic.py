"""Bytes that a compiled program's instructions read from and write to the device's main memory.

A fusion that takes a slice of an operand reads the slice, and one that updates a slice writes it. Arrays in a TPU's
on-chip memory cost nothing here: the compiler's own copies, which are counted, bring them there.
"""

from helios_jax.planner import async_fusions
from helios_jax.planner.hlo import FUSIONS, Computation, Instruction, Module

# Instructions that move nothing: views, bookkeeping, and those whose computations are counted on their own.
_FREE = """parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id while conditional call
    async-start async-update opt-barrier iota"""
FREE = frozenset(_FREE.split())
SLICES = ("dynamic-slice", "slice", "gather")
VIEWS = ("bitcast", "get-tuple-element", "tuple")


def traffic(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Bytes that one run of `instruction` reads and writes."""
    opcode = instruction.opcode
    if opcode in FREE or opcode.endswith("-done") or 'custom_call_target="AllocateBuffer"' in instruction.attributes:
        return 0
    operands = computation.operands(instruction)
    if opcode in SLICES:
        return 2 * _outside(instruction)
    if opcode == "dynamic-update-slice":
        return 2 * _outside(operands[1]) if len(operands) > 1 else 0
    if opcode == "copy-start":  # its result holds the copy, the source and a flag
        return _outside(operands[0]) + (instruction.shapes[0].bytes if instruction.shapes[0].space == 0 else 0)
    inner = module.called(instruction) if opcode in FUSIONS else None
    if inner is None:
        return _outside(instruction) + sum(map(_outside, operands))
    part = async_fusions.part(module, instruction)
    if part == "done":
        return 0
    results, buffers = async_fusions.carried(instruction) if part == "step" else (set(), set())
    read = sum(_read(module, inner, number, one) for number, one in enumerate(operands) if number not in buffers)
    return read + _written(inner, inner.root if opcode == "fusion-start" else instruction, results)


def _outside(instruction: Instruction) -> int:
    """Bytes of an instruction's result in the main memory."""
    return sum(shape.bytes for shape in instruction.shapes if shape.space == 0)


def _read(module: Module, inner: Computation, number: int, operand: Instruction) -> int:
    """Bytes that a fusion reads of an operand: all of it, or the slices that it takes."""
    if not _outside(operand) or number not in inner.parameters:
        return _outside(operand)
    sliced = 0
    for user in _users(inner, inner.parameters[number]):
        if user.opcode in SLICES and user.operands[:1]:
            sliced += user.bytes
        elif user.opcode == "dynamic-update-slice":
            continue  # an operand that is updated in place is not read
        elif user.opcode == "fusion" and (nested := module.called(user)) is not None:
            places = [
                i for i, one in enumerate(inner.operands(user)) if _source(inner, one) == inner.parameters[number]
            ]
            sliced += sum(_read(module, nested, i, operand) for i in places)
        else:
            return _outside(operand)
    return min(sliced, _outside(operand))


def _users(inner: Computation, source: Instruction) -> list[Instruction]:
    """Instructions that use `source`, through views."""
    found = []
    for user in inner.users[source.name]:
        found += _users(inner, user) or [user] if user.opcode in VIEWS else [user]
    return found


def _source(inner: Computation, one: Instruction) -> Instruction:
    """Finds the instruction that `one` is a view of."""
    while one.opcode == "bitcast":
        one = inner.operands(one)[0]
    return one


def _written(inner: Computation, fusion: Instruction, left_out: set[int]) -> int:
    """Bytes that a fusion writes: its results except those `left_out`, or the slices that it updates."""
    root = inner.root
    parts = inner.operands(root) if root.opcode == "tuple" else [root]
    if len(parts) != len(fusion.shapes):
        return _outside(fusion)
    total = 0
    for number, (part, shape) in enumerate(zip((_source(inner, one) for one in parts), fusion.shapes)):
        if shape.space or number in left_out:
            continue
        update = inner.operands(part)[1:2] if part.opcode == "dynamic-update-slice" else []
        total += update[0].bytes if update else shape.bytes
    return total
