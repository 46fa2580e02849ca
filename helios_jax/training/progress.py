"""Progress of a run: a bar or plain lines, `metrics.jsonl`, and TensorBoard's file, on the first host."""

import contextlib
import hashlib
import io
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2, summary_pb2

from helios_jax import config as configs
from helios_jax.locations import Mirror
from helios_jax.training.errors import writing
from helios_jax.training.goodput import Goodput
from helios_jax.training.run_config import TrainConfig
from helios_jax.training.work import Meter

EVENTS: Any = event_pb2  # its classes are made when it is imported
SUMMARIES: Any = summary_pb2
COMPILING = "compiling the first step"
NOT_DRAWN = ("began", "computing_seconds")  # kept for the next process
SHOWN, WIDE = 33, 320  # limits of a validation video in TensorBoard: frames, and pixels of width


class Board:
    """TensorBoard's file, flushed after each event: on a full disk, tensorboardX's own writer thread dies silently."""

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
    """Makes a bar that shows the steps and the time left at any width; the rest is cut to fit.

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
    """Shows mean metrics of the steps in a bar (in plain lines without a terminal) and writes them, on the first host.

    `learning_rates` maps the number of a step, from 0, to its rates by name. `began` is when the process began, in
    seconds since 1970. `meter` must have counted the steps of a report. Raises RunError for files that cannot be
    written.
    """

    def __init__(
        self,
        folder: Path,
        first: int,
        config: TrainConfig,
        learning_rates: Callable[[int], Mapping[str, float]],
        began: float,
        meter: Meter,
    ):
        self._config, self._first, self._begin = config, first, time.monotonic()
        self.goodput = Goodput({}, began)
        self._last = (first, self._begin)
        self._meter = meter
        self._rates: dict[str, float] = {}
        self._learning_rates = learning_rates
        self._writes = jax.process_index() == 0
        self._bar = self._wandb = None
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
            if kept:
                self.goodput = Goodput(json.loads(kept[-1]), began)
            self._board = Board(self._mirror.folder / "tensorboard", first + 1)
        if config.wandb is not None:
            import wandb  # pyright: ignore[reportMissingImports]

            # The id is the same after a restart, so that the run goes on there, too.
            name = hashlib.sha256(f"{folder.absolute()} {self.goodput.began}".encode()).hexdigest()[:16]
            to = {"project": config.wandb, "id": name, "resume": "allow", "dir": self._mirror.folder}
            self._wandb = wandb.init(**to, config=configs.to_dict(config))
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
        if self._wandb is not None:
            self._wandb.finish()
        if self._writes:
            # On a full disk, closing fails again; the first error is the one to report.
            with contextlib.suppress(OSError) if error[0] else writing(self._config.run):
                self._board.close()
                self._mirror.close()

    def report(self, step: int, metrics: dict[str, float]) -> None:
        """Shows and writes the means of the steps since the last report."""
        now = time.monotonic()
        steps, seconds = step - self._last[0], max(now - self._last[1], 1e-9)
        counted = self._meter.take(seconds)
        if step > self._first + 1:  # the first step's time is mostly compilation
            self._rates = {"steps_per_second": steps / seconds, **counted}
        self._last = (step, now)
        if not self._writes or not metrics:
            return
        metrics = {**metrics, **self._learning_rates(step - 1)}
        figures = {**self._rates, **self.goodput.report()}
        line = json.dumps({"step": step, "seconds": round(now - self._begin, 3), **metrics, **figures})
        with writing(self._config.run):
            with self._metrics.open("a") as file:
                file.write(f"{line}\n")
            drawn = {name: value for name, value in {**metrics, **figures}.items() if name not in NOT_DRAWN}
            values = [summary.scalar(name, value).value[0] for name, value in drawn.items()]
            self._board.add(SUMMARIES.Summary(value=values), step)  # one event, so that the file is flushed once
            self._mirror.sync()
        if self._wandb is not None:
            self._wandb.log({**metrics, **figures}, step=step)
        total, rates = self._config.steps, self._rates
        left = f"{_clock((total - step) / rates['steps_per_second'])} left" if rates else ""
        named = [f"{rates['steps_per_second']:.3g} steps/s"] if rates else []
        named += [f"MFU {100 * rates['mfu']:.0f}%"] if "mfu" in rates else []
        named += [f"{name} {value:.4g}" for name, value in metrics.items()]
        if self._bar:
            self._bar.update(self._task, completed=step, left=left, description="  ".join(named))
        else:
            print(fitting(list(filter(None, (f"step {step}/{total}", left, *named)))), flush=True)

    def pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Puts pictures, uint8 [h, w, 3], and videos [t, h, w, 3] of a validation into TensorBoard.

        The time that validation took is not counted as time of the steps.
        """
        self._last = (step, time.monotonic())
        if not self._writes:
            return
        with writing(self._config.run):
            for name, shown in pictures.items():
                if shown.ndim == 3:
                    self._board.add(summary.image(f"validation/{name}", shown, dataformats="HWC"), step)
                else:
                    self._board.add(_moving(f"validation/{name}", animation(shown)), step)


def fitting(parts: Sequence[str], width: int = 80) -> str:
    """The first of `parts` that fit a line of `width` columns; the first one always."""
    line = parts[0]
    for part in parts[1:]:
        if len(line) + 2 + len(part) > width:
            break
        line += f"  {part}"
    return line


def animation(frames: UInt8[np.ndarray, "t h w 3"]) -> bytes:
    """A GIF of a video, at most SHOWN frames of it at most WIDE pixels wide, at about its own pace."""
    step, shrink = -(-len(frames) // SHOWN), -(-frames.shape[2] // WIDE)
    pictures = [Image.fromarray(frame[::shrink, ::shrink]) for frame in frames[::step]]
    file = io.BytesIO()
    pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=1000 * step // 24, loop=0)
    return file.getvalue()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # half a line: the process was killed while writing it


def _moving(name: str, gif: bytes) -> Any:
    """A summary of an animation: TensorBoard passes the bytes of an image to the browser, which plays a GIF."""
    height, width = Image.open(io.BytesIO(gif)).size[::-1]
    image = SUMMARIES.Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif)
    return SUMMARIES.Summary(value=[SUMMARIES.Summary.Value(tag=name, image=image)])


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
