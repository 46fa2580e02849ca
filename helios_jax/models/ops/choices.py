"""Implementations of attention and norms: by name, or the default for a kind of device.

Defaults are data, in choices.json. They rest on published figures and on counts of bytes moved, until the figures of a
device are measured (`make gpu-report ARGS=--write`).
"""

import json
import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from helios_jax.sharding import ContextAttention
from pallas_kernels.core import device

log = logging.getLogger(__name__)

PATH = Path(__file__).with_name("choices.json")
Attention = Literal["xla", "cudnn", "pallas"]
Norms = Literal["xla", "pallas"]


@dataclass(frozen=True)
class Implementations:
    """Implementations asked for by name. None takes the device's default, or XLA if that cannot run.

    `context` is the algorithm of self-attention where the mesh splits tokens (`context_attention`).
    """

    attention: Attention | None = None
    norms: Norms | None = None
    context: ContextAttention = "ulysses"


DEVICE = Implementations()  # the device chooses


@cache
def _table() -> dict[str, dict[str, str]]:
    return json.loads(PATH.read_text())


def default(op: Literal["attention", "norms"]) -> str:
    """The default for the device at hand: the entry whose name is the longest prefix of the device kind's name."""
    names = [name for name in _table()[op] if device.kind().startswith(name)]
    return _table()[op][max(names, key=len)]


def write(kind: str, chosen: dict[str, str]) -> None:
    """Makes `chosen` (op: implementation) the defaults for devices of this kind."""
    table: dict[str, dict[str, str]] = json.loads(PATH.read_text())
    for op, name in chosen.items():
        table[op][kind] = name
    lines = (f"  {json.dumps(op)}: {json.dumps(dict(sorted(kinds.items())))}" for op, kinds in table.items())
    PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    _table.cache_clear()


@cache
def say(line: str) -> None:
    """Logs a line once per process."""
    log.info(line)
