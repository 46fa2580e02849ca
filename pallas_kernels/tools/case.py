"""A case of an op for `check`: the kernel, its reference, and the shapes of their inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

EPS = 1e-6
DTYPES = {"bfloat16": 0.01, "float32": 1e-5}  # largest error allowed, relative to the root mean square


@dataclass(frozen=True)
class Case:
    """A kernel (`ours`) and its `reference`, both called with random inputs of the shapes `tokens` and then `others`.

    `tokens` have the case's dtype, `others` are float32. `allowed` replaces the dtype's largest error.
    """

    op: str
    what: str
    dtype: str
    ours: Callable[..., Any]
    reference: Callable[..., Any]
    tokens: tuple[tuple[int, ...], ...]
    others: tuple[tuple[int, ...], ...] = ()
    allowed: float | None = None


def both(
    op: Callable[..., Any], reference: Callable[..., Any], *rest: Any
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The op by Pallas and its reference, as functions of arrays alone; `rest` are the arguments after them."""
    return lambda *x: op(*x, *rest, implementation="pallas"), lambda *x: reference(*x, *rest)
