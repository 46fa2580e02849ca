"""A case of an op for `check`: our kernel and its reference, and the shapes of their inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

EPS = 1e-6
DTYPES = {"bfloat16": 0.01, "float32": 1e-5}  # how far a result may be, as a part of its root mean square


@dataclass(frozen=True)
class Case:
    """`ours` and the `reference` of the same float inputs, of which `tokens` have the dtype and the others float32."""

    op: str
    what: str
    dtype: str
    ours: Callable[..., Any]
    reference: Callable[..., Any]
    tokens: tuple[tuple[int, ...], ...]
    others: tuple[tuple[int, ...], ...] = ()


def both(
    op: Callable[..., Any], reference: Callable[..., Any], *rest: Any
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The op by Pallas and its reference, of the arrays that `rest` comes after."""
    return lambda *x: op(*x, *rest, implementation="pallas"), lambda *x: reference(*x, *rest)
