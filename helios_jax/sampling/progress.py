"""Progress of a run: bars on a terminal, else a line for each video and chunk.

Bars are drawn on stderr. While they are shown, rich prints other lines of this process above them, if those go through
`sys.stdout` and `sys.stderr` as they are at that time.
"""

import datetime
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from helios_jax.runtime.program import before_compiling
from helios_jax.sampling.plan import Plan

COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    TextColumn("{task.fields[count]}", style="progress.download"),
    TimeRemainingColumn(),
)
SPEED_OVER = 3600.0  # seconds to average the speed over: a chunk may take longer than rich's default of 30


class RunProgress:
    """Progress of a run's videos, to be entered (`with`) while each is made.

    `chunks` has the number of chunks of each video, None for one without end. The time left is estimated from chunks
    that are in the file, without the first one, which includes compilation.
    """

    def __init__(self, chunks: Sequence[int | None], clock: Callable[[], float] | None = None):
        self.live = sys.stderr.isatty()
        self._chunks = list(chunks)
        self._bars = Progress(
            *COLUMNS,
            console=Console(stderr=True),
            get_time=clock,
            disable=not self.live,
            redirect_stdout=sys.stdout.isatty(),
            speed_estimate_period=SPEED_OVER,
        )
        self._videos = self._bars.add_task("videos", total=None, count="", visible=len(self._chunks) > 1)
        self._chunk_bar = self._bars.add_task("chunks", count="")
        self._step_bar = self._bars.add_task("steps", count="")
        self._stack = ExitStack()
        self._announced = False  # the compilation, on a line of its own
        self._video = 0

    def begin(self, video: int, name: str) -> None:
        """Announces the next video, counted from 0, and the time left. Videos that failed leave the estimate."""
        self._video, count, left = video, len(self._chunks), self._chunks[video:]
        task = self._bars.tasks[0]
        # Not through `update`, which forgets the speed when the total changes.
        task.total = None if None in left else task.completed + sum(x for x in left if x is not None)
        self._bars.update(self._videos, count=f"{video}/{count}")
        if count > 1:
            print(f"video {video + 1}/{count}: {name}{self._left()}", flush=True)

    def start(self, plan: Plan) -> None:
        """Begins the chunks of a video."""
        self._bars.reset(self._chunk_bar, total=plan.num_chunks, count=f"0/{plan.num_chunks or '-'}")
        self._bars.reset(self._step_bar, total=plan.num_steps(0), count=f"0/{plan.num_steps(0)}")

    def step(self, step: int, total: int) -> None:
        """Shows that a step, counted from 0, has been computed."""
        if step == 0:
            self._bars.reset(self._step_bar, total=total)
        self._bars.update(self._step_bar, completed=step + 1, count=f"{step + 1}/{total}", description="steps")

    def chunk(self, done: int, total: int | None, frames: int) -> None:
        """Shows that `done` chunks of the video, with `frames` frames in all, are in its file."""
        count = f"{done}/{total or '-'}"
        self._bars.update(self._chunk_bar, completed=done, count=count)
        self._bars.update(self._videos, advance=1, count=f"{self._video + (done == total)}/{len(self._chunks)}")
        if not self.live:
            print(f"chunk {count}  {frames} frames{self._left() if total not in (None, done) else ''}", flush=True)

    def _left(self) -> str:
        """The time that the rest of the run takes, for the end of a line; empty while it is not known."""
        seconds = self._bars.tasks[0].time_remaining
        return "" if seconds is None else f", about {datetime.timedelta(seconds=round(seconds))} left"

    def __enter__(self) -> "RunProgress":
        self._stack.enter_context(before_compiling(self._compiling))
        self._stack.enter_context(self._bars)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _compiling(self) -> None:
        self._bars.update(self._step_bar, description="compiling")
        if not self.live and not self._announced:
            print("compiling: the first chunk takes longer", flush=True)
        self._announced = True
