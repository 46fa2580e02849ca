"""Goodput of a run: the share of its time spent on steps that count.

The rest is lost: the time before the first step (starting, loading, compiling), for saving and validation, for waiting
on data while the devices are idle, between a stop and the next start, and for steps that are repeated after a kill.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

LOST: tuple[str, ...] = ("input", "saving", "validation")


class Goodput:
    """Times of a run since it first began, in seconds.

    `before` is the last line of metrics of the processes before this one, without steps that are repeated; empty for a
    new run. `began` is when this process began, in seconds since 1970.
    """

    def __init__(self, before: Mapping[str, Any], began: float):
        self.began = float(before.get("began", began))
        self._computing = float(before.get("computing_seconds", 0.0))
        self._first = True
        self._last = time.monotonic()
        self._lost = dict.fromkeys(LOST, 0.0)

    @contextlib.contextmanager
    def losing(self, kind: str) -> Iterator[None]:
        """Counts the time inside as lost to `kind`, one of LOST."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self.lose(kind, time.monotonic() - begin)

    def lose(self, kind: str, seconds: float) -> None:
        """Counts seconds as lost."""
        self._lost[kind] += seconds

    def report(self) -> dict[str, float]:
        """The figures for a line of metrics; the seconds lost to each of LOST are counted since the last report."""
        now = time.monotonic()
        lost, self._lost = self._lost, dict.fromkeys(LOST, 0.0)
        if not self._first:  # the first step's time is mostly compilation
            self._computing += max(now - self._last - sum(lost.values()), 0.0)
        self._first, self._last = False, now
        share = self._computing / max(time.time() - self.began, 1e-9)
        figures = {f"{kind}_seconds": round(seconds, 3) for kind, seconds in lost.items()}
        figures |= {"computing_seconds": round(self._computing, 3), "began": self.began}
        return {"goodput": min(share, 1.0), **figures}
