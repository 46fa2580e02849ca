"""A compiled program read from its optimised HLO text: computations, instructions, and how often each one runs.

The text is all that XLA gives of a program for an absent device. It is in the order of execution (`is_scheduled`), so
an instruction between the start and the done of another one runs beside it.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128}

FUSIONS = ("fusion", "fusion-start")  # newer GPU programs slice weights with the second, beside other work

_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_END = re.compile(r"\}(, execution_thread=.*)?\s*")
_COMMENT = re.compile(r"/\*.*?\*/")
_TRIPS = re.compile(r"known_trip_count\D{1,12}(\d+)")


@dataclass(frozen=True)
class Shape:
    """An array of a program. `space` is its memory: 0 the device's main one, 1 a TPU's on-chip one, 5 the host's."""

    dtype: str
    sizes: tuple[int, ...]
    space: int = 0

    @property
    def elements(self) -> int:
        return math.prod(self.sizes)

    @property
    def bytes(self) -> int:
        bits = BITS.get(self.dtype) or int((re.search(r"\d+", self.dtype) or [0])[0])
        return self.elements * bits // 8


@dataclass(frozen=True)
class Instruction:
    """One line: arrays of its result, names of its operands, and its attributes as text."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    inside: str  # the parentheses after the opcode: operands, or a constant's value
    attributes: str
    root: bool

    def attribute(self, name: str) -> str | None:
        """The word after `name=`, without %; None where there is none."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return found and found[1]

    @property
    def bytes(self) -> int:
        """Bytes of its result, in any memory."""
        return sum(shape.bytes for shape in self.shapes)


@dataclass
class Computation:
    """Instructions by name, in the order of execution."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @cached_property
    def root(self) -> Instruction:
        return next(one for one in reversed(self.instructions.values()) if one.root)

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(one.inside): one for one in self.instructions.values() if one.opcode == "parameter"}

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for one in self.instructions.values():
            for operand in dict.fromkeys(one.operands):
                found.setdefault(operand, []).append(one)
        return found

    def operands(self, instruction: Instruction) -> list[Instruction]:
        return [self.instructions[name] for name in instruction.operands if name in self.instructions]


@dataclass
class Module:
    """A program: its computations by name, and the name of the one that runs."""

    computations: dict[str, Computation]
    entry: str

    def called(self, instruction: Instruction) -> Computation | None:
        """The computation of a fusion, a call or an asynchronous start."""
        name = instruction.attribute("calls") or instruction.attribute("to_apply")
        return self.computations.get(name or "")

    def branches(self, instruction: Instruction) -> list[Computation]:
        """The computations of a conditional."""
        listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
        names = re.findall(r"[\w.\-]+", listed[1]) if listed else []
        names = names or [instruction.attribute(f"{which}_computation") or "" for which in ("true", "false")]
        return [self.computations[name] for name in names if name in self.computations]

    def trips(self, loop: Instruction) -> int | None:
        """The trip count of a while loop, as stated or from its condition's constant; None if the text has neither."""
        if known := _TRIPS.search(loop.attributes):
            return int(known[1])
        condition = self.computations.get(loop.attribute("condition") or "")
        if condition is None:
            return None
        compare = condition.root
        if compare.opcode == "fusion" and (inner := self.called(compare)) is not None:
            compare = inner.root
        if compare.opcode != "compare" or compare.attribute("direction") not in ("LT", "GT", "LE", "GE"):
            return None
        constants = [one for one in condition.instructions.values() if one.opcode == "constant"]
        numbers = [int(one.inside) for one in constants if re.fullmatch(r"\d+", one.inside)]
        if len(numbers) != 1:
            return None
        return numbers[0] + (compare.attribute("direction") in ("LE", "GE"))


def parse(text: str) -> Module:
    """The module of `text`, as `jax.stages.Compiled.as_text` gives it. Raises ValueError when it has no entry."""
    computations: dict[str, Computation] = {}
    entry, current = None, None
    for line in text.splitlines():
        if current is None:
            if head := _HEAD.match(line):
                current = computations[head[2]] = Computation(head[2])
                entry = head[2] if head[1] else entry
        elif _END.fullmatch(line):  # a kernel's description has several lines, which may begin with }
            current = None
        elif named := _NAME.match(line):
            one = _instruction(named[2], bool(named[1]), line[named.end() :])
            current.instructions[one.name] = one
    if entry is None:
        raise ValueError("the text has no ENTRY computation, so it is not the HLO of a compiled program")
    return Module(computations, entry)


def _instruction(name: str, root: bool, rest: str) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shapes, rest = _shapes(rest[:end]), rest[end:]
    opcode = _OPCODE.match(rest)
    if opcode is None:
        raise ValueError(f"instruction {name} has no opcode: {rest[:80]}")
    close = _closing(rest, opcode.end() - 1)
    inside = _COMMENT.sub("", rest[opcode.end() : close])
    operands = () if opcode[1] in ("parameter", "constant", "iota") else tuple(_operands(inside))
    return Instruction(name, opcode[1], shapes, operands, inside.strip(), rest[close + 1 :], root)


def _closing(text: str, start: int) -> int:
    """The index of the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"parentheses do not close: {text[start : start + 80]}")


def _shapes(text: str) -> tuple[Shape, ...]:
    found = []
    for dtype, sizes, layout in _ARRAY.findall(_COMMENT.sub("", text)):
        space = re.search(r"S\((\d+)\)", layout)
        found.append(Shape(dtype, tuple(int(n) for n in sizes.split(",") if n), int(space[1]) if space else 0))
    return tuple(found)


def _operands(inside: str) -> Iterator[str]:
    """Names of operands: with % as usual, or the last word of each where it is left out."""
    if "%" in inside:
        yield from re.findall(r"%([\w.\-]+)", inside)
        return
    depth, word = 0, ""
    for letter in inside + ",":
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            if word.strip():
                yield word.split()[-1]
            word = ""
        else:
            word += letter
