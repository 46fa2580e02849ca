"""A case of an op for `check`: the kernel, its reference, and the shapes of their inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

EPS = 1e-6
DTYPES = {"bfloat16": 0.01, "float32": 1e-5}  # largest error allowed, relative to the root mean square


@dataclass(frozen=True)
class Case:
    """`ours` and the `reference` of the same float inputs. `tokens` have the case's dtype; the others are float32.

    `allowed` is the largest error, where that of the dtype does not do.
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
    """The op by Pallas and its reference, of the arrays that `rest` comes after."""
    return lambda *x: op(*x, *rest, implementation="pallas"), lambda *x: reference(*x, *rest)
