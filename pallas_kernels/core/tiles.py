"""Block sizes by op, kind of device and length. They are data in tiles.json, written by `make tune`."""

import json
from functools import cache
from pathlib import Path

PATH = Path(__file__).with_name("tiles.json")
Tiles = dict[str, int]
# op -> start of a device kind's name ("": any) -> longest length of these sizes ("": any) -> sizes
Table = dict[str, dict[str, dict[str, Tiles]]]


@cache
def table() -> Table:
    return json.loads(PATH.read_text())


def lookup(op: str, kind: str, length: int) -> Tiles:
    """Sizes for `op` over `length` tokens on a device whose kind is `kind`, such as "TPU v5" or "NVIDIA H100 PCIe".

    They are those of the longest matching name that has any for this length. Raises KeyError if none has.
    """
    kinds = [name for name in table()[op] if kind.startswith(name)]
    for name in sorted(kinds, key=len, reverse=True):
        lengths = table()[op][name]
        fits = [longest for longest in lengths if longest and length <= int(longest)]
        if fits or "" in lengths:
            return lengths[min(fits, key=int, default="")]
    raise KeyError(f"{PATH.name} has no sizes for {op} over {length} tokens on {kind}")


def write(op: str, kind: str, length: int, sizes: Tiles) -> None:
    """Stores `sizes` for lengths up to `length` in the table and its file; other entries stay."""
    whole: Table = json.loads(PATH.read_text())
    whole.setdefault(op, {}).setdefault(kind, {})[str(length)] = sizes
    PATH.write_text(text(whole))
    table.cache_clear()


def text(whole: Table) -> str:
    """The table as text: one line per length, shorter lengths first."""

    def nested(items: dict[str, str], indent: str) -> str:
        lines = ",\n".join(f"{indent}  {json.dumps(name)}: {item}" for name, item in items.items())
        return f"{{\n{lines}\n{indent}}}"

    def by_length(lengths: dict[str, Tiles]) -> dict[str, str]:
        ordered = sorted(lengths, key=lambda longest: float(longest or "inf"))
        return {longest: json.dumps(lengths[longest]) for longest in ordered}

    ops = {
        op: nested({kind: nested(by_length(lengths), "    ") for kind, lengths in kinds.items()}, "  ")
        for op, kinds in whole.items()
    }
    return nested(ops, "") + "\n"
