"""Progress of a run: a bar or plain lines, `metrics.jsonl`, and TensorBoard's file, on the first host."""

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2

from helios_jax.locations import Mirror
from helios_jax.training.errors import writing
from helios_jax.training.run_config import TrainConfig

EVENTS: Any = event_pb2  # its classes are made when it is imported
COMPILING = "compiling the first step"


class Board:
    """TensorBoard's file, written at once: the thread of tensorboardX's own writer would die of a full disk unheard."""

    def __init__(self, folder: Path, step: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"), f".{step}")
        # A run that was killed after its last checkpoint repeats the steps from `step` on.
        self._write(step, session_log=EVENTS.SessionLog(status=EVENTS.SessionLog.START))

    def add(self, values: Any, step: int) -> None:
        """Adds a summary of `tensorboardX.summary`."""
        self._write(step, summary=values)

    def _write(self, step: int, **content: Any) -> None:
        self._writer.write_event(EVENTS.Event(wall_time=time.time(), step=step, **content))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def make_bar(console: Console | None = None) -> Progress:
    """A bar with the steps and the time left at any width; what else does not fit is cut.

    Lines that are printed while it is shown, also to stderr, appear above it.
    """
    return Progress(
        BarColumn(bar_width=None, table_column=Column(ratio=1, max_width=20)),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[left]}", table_column=Column(no_wrap=True)),
        TextColumn("{task.description}", table_column=Column(ratio=4, no_wrap=True, overflow="ellipsis")),
        console=console,
        expand=True,
    )


class Reporter:
    """Means of the steps, shown in a bar (in plain lines where there is no terminal) and written, on the first host.

    `learning_rate` is that of the step of a number, from 0. Raises RunError for files that cannot be written.
    """

    def __init__(self, folder: Path, first: int, config: TrainConfig, learning_rate: Callable[[int], float]):
        self._config, self._first, self._begin = config, first, time.monotonic()
        self._last = (first, self._begin)
        self._rate: float | None = None
        self._learning_rate = learning_rate
        self._writes = jax.process_index() == 0
        self._bar = None
        if not self._writes:
            return
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._mirror = Mirror(folder)
            self._metrics = self._mirror.take("metrics.jsonl")
            # A run that was killed after its last checkpoint repeats those steps: their lines are removed.
            lines = self._metrics.read_text().splitlines() if self._metrics.exists() else []
            kept = [line for line in lines if _step_of(line) <= first]
            if kept != lines:
                part = self._metrics.with_suffix(".part")
                part.write_text("".join(f"{line}\n" for line in kept))
                part.replace(self._metrics)
            self._board = Board(self._mirror.folder / "tensorboard", first + 1)
        if sys.stdout.isatty():
            self._bar = make_bar()
            self._task = self._bar.add_task(COMPILING, total=config.steps, completed=first, left="")

    def __enter__(self) -> "Reporter":
        if self._bar:
            self._bar.start()
        elif self._writes and self._first < self._config.steps:
            print(COMPILING, flush=True)
        return self

    def __exit__(self, *error: Any) -> None:
        if self._bar:
            self._bar.stop()
        if self._writes:
            # A file whose disk is full fails again: the first error is the one to tell.
            with contextlib.suppress(OSError) if error[0] else writing(self._config.run):
                self._board.close()
                self._mirror.close()

    def report(self, step: int, metrics: dict[str, float]) -> None:
        """Shows and writes the means of the steps since the last report."""
        now = time.monotonic()
        if step > self._first + 1:  # the first step's time is that of compiling
            self._rate = (step - self._last[0]) / max(now - self._last[1], 1e-9)
        self._last = (step, now)
        if not self._writes or not metrics:
            return
        metrics = {**metrics, "lr": self._learning_rate(step - 1)}
        if self._rate is not None:
            metrics["steps_per_second"] = self._rate
        line = json.dumps({"step": step, "seconds": round(now - self._begin, 3), **metrics})
        with writing(self._config.run):
            with self._metrics.open("a") as file:
                file.write(f"{line}\n")
            for name, value in metrics.items():
                self._board.add(summary.scalar(name, value), step)
            self._mirror.sync()
        total = self._config.steps
        rate = "" if self._rate is None else f"{self._rate:.2f} steps/s"
        left = "" if self._rate is None else f"{_clock((total - step) / self._rate)} left"
        named = "  ".join(f"{k} {v:.4g}" for k, v in metrics.items() if k != "steps_per_second")
        if self._bar:
            self._bar.update(self._task, completed=step, left=left, description=f"{rate}  {named}")
        else:
            print("  ".join(filter(None, (f"step {step}/{total}", named, rate, left))), flush=True)

    def pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Puts uint8 [h, w, 3] of a validation into TensorBoard; its time does not count as the steps'."""
        self._last = (step, time.monotonic())
        if self._writes:
            with writing(self._config.run):
                for name, picture in pictures.items():
                    self._board.add(summary.image(f"validation/{name}", picture, dataformats="HWC"), step)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # half a line: the process was killed while writing it


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
