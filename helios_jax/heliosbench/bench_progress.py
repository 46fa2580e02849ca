"""Progress of the benchmark: a bar on a terminal, else a line for each video, both with the time that is left."""

import datetime
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
SPEED_OVER = 3600.0  # seconds that the speed is averaged over: rich's 30 are less than many videos take


class BenchProgress:
    """Counts videos; `with` while they are measured."""

    def __init__(self, total: int):
        self._live = sys.stderr.isatty()
        self._total, self._done, self._begin = total, 0, time.monotonic()
        self._bars = Progress(
            *COLUMNS, console=Console(stderr=True), disable=not self._live, speed_estimate_period=SPEED_OVER
        )
        self._task = self._bars.add_task("videos", total=total)

    def done(self, name: str) -> None:
        """Counts a video that has been measured or has failed."""
        self._done += 1
        self._bars.update(self._task, advance=1, description=name)
        if not self._live:
            seconds = (time.monotonic() - self._begin) / self._done * (self._total - self._done)
            left = f", about {datetime.timedelta(seconds=round(seconds))} left" if self._done < self._total else ""
            print(f"{self._done}/{self._total}: {name}{left}", flush=True)

    def __enter__(self) -> "BenchProgress":
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()
