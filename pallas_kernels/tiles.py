"""Block sizes, by op, kind of device and length: data in tiles.json."""

import json
from functools import cache
from pathlib import Path

PATH = Path(__file__).with_name("tiles.json")
Tiles = dict[str, int]


@cache
def table() -> dict[str, dict[str, dict[str, Tiles]]]:
    """op -> the beginning of a device kind's name ("" is any) -> longest length they are for ("" is any) -> sizes."""
    return json.loads(PATH.read_text())


def lookup(op: str, kind: str, length: int) -> Tiles:
    """Sizes for `op` over `length` tokens on a device whose kind is `kind`, such as "TPU v5" or "NVIDIA H100 PCIe"."""
    kinds = [name for name in table()[op] if kind.startswith(name)]
    lengths = table()[op][max(kinds, key=len)]
    fits = [int(longest) for longest in lengths if longest and length <= int(longest)]
    return lengths[str(min(fits)) if fits else ""]
