"""Asynchronous collectives of TPU programs, which are made of fusions.

One fusion starts the collective, others carry it on beside work of their own, and one waits for it. All of them hold
the collective, with one channel, and pass its buffers along.
"""

import re
from typing import Literal

from helios_jax.planner.hlo import Computation, Instruction, Module

_ALIASES = re.compile(r"output_to_operand_aliasing=\{(.*?\}\))\}")
_PAIR = re.compile(r"\{(\d*)\}: \((\d+)")
_CHANNEL = re.compile(r"channel_id=(\d+)")


def part(module: Module, instruction: Instruction) -> Literal["start", "step", "done"] | None:
    """The part that a fusion has in an asynchronous collective; None for other instructions."""
    inner = module.called(instruction) if instruction.opcode == "fusion" else None
    if inner is None:
        return None
    if inner.name.startswith("async_collective_fusion"):
        return "step"
    marks = [one for one in inner.instructions.values() if one.opcode == "custom-call"]
    if any('custom_call_target="AsyncCollectiveStart"' in one.attributes for one in marks):
        return "start"
    return "done" if any('custom_call_target="AsyncCollectiveDone"' in one.attributes for one in marks) else None


def carried(instruction: Instruction) -> tuple[set[int], set[int]]:
    """The numbers of a step's (results, operands) that are the collective's buffers."""
    found = _ALIASES.search(instruction.attributes)
    pairs = _PAIR.findall(found[1]) if found else []
    return {int(result or 0) for result, _ in pairs}, {int(operand) for _, operand in pairs}


def done(module: Module, computation: Computation, start: Instruction) -> str | None:
    """The name of the fusion that waits for the collective which `start` starts."""
    channel, found = _channel(module, start), start
    while found is not None and part(module, found) != "done":
        users = [two for one in computation.users[found.name] for two in (one, *computation.users[one.name])]
        following = (one for one in users if part(module, one) and _channel(module, one) == channel)
        found = next(following, None)
    return found and found.name


def _channel(module: Module, fusion: Instruction) -> str | None:
    inner = module.called(fusion)
    found = [_CHANNEL.search(one.attributes) for one in inner.instructions.values()] if inner else []
    return next((one[1] for one in found if one), None)
