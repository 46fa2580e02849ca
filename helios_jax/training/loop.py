"""The loop that every stage shares: one jitted step, batches, progress, metrics, checkpoints, and clean ends."""

import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from tensorboardX import SummaryWriter

from helios_jax.sharding import put_batch, shardings
from helios_jax.training.checkpoint import Checkpoints
from helios_jax.training.config import TrainConfig
from helios_jax.training.optim import learning_rate
from helios_jax.training.state import TrainState, update

Metrics = dict[str, Any]
Step = Callable[[TrainState, Any, jax.Array], tuple[TrainState, Metrics]]


class NotFiniteError(ArithmeticError):
    """A loss or gradient that is NaN or infinite; the message is one line."""


class Batches(Protocol):
    """Batches (numpy, this host's part) whose position can be saved as plain JSON and set again."""

    def __next__(self) -> Any: ...
    def __iter__(self) -> Iterator[Any]: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...


def make_step(
    stage: ModuleType, config: TrainConfig, optimizer: optax.GradientTransformation, state: TrainState, mesh: Mesh
) -> Step:
    """The jitted `(state, batch, seed key) -> (state, metrics)`; the state's memory is used again for the new one.

    The key of a step is `fold_in(seed key, step)`, so a resumed run draws what an uninterrupted one would have.
    """

    def step(state: TrainState, batch: Any, seed_key: jax.Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(seed_key, state.step)
        gradient = jax.value_and_grad(stage.loss, has_aux=True)
        (loss, metrics), grads = gradient(state.model, batch, key, config)
        metrics = {"loss": loss, "grad_norm": optax.global_norm(grads), **metrics}
        return update(state, grads, optimizer, config.optim.ema), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings(state, mesh), None))


def run(
    step: Step, state: TrainState, batches: Batches, checkpoints: Checkpoints, config: TrainConfig, mesh: Mesh
) -> tuple[TrainState, signal.Signals | None]:
    """Train until `config.steps`; returns the last state and the signal that ended the run early, if one did.

    SIGTERM and SIGINT finish the step, save and return; a second one ends the process at once. A NaN or infinite loss
    or gradient raises NotFiniteError: metrics are checked before every save, so the checkpoints stay good.
    """
    seed_key = jax.random.key(config.seed)
    first = done = int(state.step)
    window: list[Metrics] = []
    reporter = Reporter(Path(config.run), first, config)
    with _Signals() as signals, reporter:
        while done < config.steps:
            state, metrics = step(state, put_batch(next(batches), mesh), seed_key)
            done += 1
            window.append(metrics)
            log = done % config.log_every == 0 or done == first + 1 or done == config.steps
            # Hosts must agree to stop; they ask one another only where they wait for the device anyway.
            stop = signals.received(agree=log)
            save = done % config.checkpoint.every == 0 or done == config.steps or stop is not None
            if log or save:
                reporter.report(done, _mean(window, done, checkpoints))
                window = []
            if save:
                checkpoints.save(state, batches.get_state(), config)
            if stop is not None:
                break
    checkpoints.wait()
    return state, signals.received(agree=False) if done < config.steps else None


def _mean(window: list[Metrics], done: int, checkpoints: Checkpoints) -> dict[str, float]:
    """Means over the steps since the last report, after checking that all of them are finite."""
    values = [{k: float(v) for k, v in m.items()} for m in jax.device_get(window)]
    for i, metrics in enumerate(values):
        for name in ("loss", "grad_norm"):
            if not math.isfinite(metrics[name]):
                checkpoints.wait()
                good = checkpoints.latest
                kept = "no checkpoint was written" if good is None else f"step {good} in {checkpoints.folder} is good"
                raise NotFiniteError(
                    f"step {done - len(values) + 1 + i}: {name} is {metrics[name]}; {kept}; "
                    "lower optim.lr, clip with optim.clip_norm, or look at the data"
                )
    names = sorted(values[0], key=lambda name: (name != "loss", name)) if values else []
    return {name: float(np.mean([m[name] for m in values])) for name in names}


class _Signals:
    """Remembers SIGTERM and SIGINT; the second one acts as it would have without us."""

    def __enter__(self) -> "_Signals":
        self._seen: signal.Signals | None = None
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, number: int, frame: Any) -> None:
        self._seen = signal.Signals(number)
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def __exit__(self, *error: Any) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def received(self, agree: bool) -> signal.Signals | None:
        """The signal to act on; with several hosts, one that any of them got, told when all of them ask."""
        if jax.process_count() == 1:
            return self._seen
        if agree:
            seen = multihost_utils.process_allgather(np.int32(self._seen or 0))
            self._seen = signal.Signals(int(seen.max())) if seen.max() else None
            return self._seen
        return None


class Reporter:
    """A progress bar (a plain line where there is no terminal), `metrics.jsonl` and TensorBoard, on the first host."""

    def __init__(self, folder: Path, first: int, config: TrainConfig):
        self._config, self._first, self._begin = config, first, time.monotonic()
        self._last = (first, self._begin)
        self._rate: float | None = None
        self._learning_rate: Callable[[int], Any] = learning_rate(config.optim, config.steps)
        self._writes = jax.process_index() == 0
        self._bar = None
        if not self._writes:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        # A run that was killed after its last checkpoint repeats those steps; what it logged of them goes.
        kept = [x for x in path.read_text().splitlines() if _step_of(x) <= first] if path.exists() else []
        path.write_text("".join(f"{x}\n" for x in kept))
        self._lines = path.open("a")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first + 1)
        if sys.stdout.isatty():
            columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            self._bar = Progress(*columns)
            self._task = self._bar.add_task("compiling", total=config.steps, completed=first)

    def __enter__(self) -> "Reporter":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._bar:
            self._bar.stop()
        if self._writes:
            self._lines.close()
            self._board.close()

    def report(self, step: int, metrics: dict[str, float]) -> None:
        """Show and write the means of the steps since the last report."""
        now = time.monotonic()
        if step > self._first + 1:  # the first step's time is that of compiling
            self._rate = (step - self._last[0]) / max(now - self._last[1], 1e-9)
        self._last = (step, now)
        if not self._writes or not metrics:
            return
        metrics = {**metrics, "lr": float(self._learning_rate(step - 1))}
        if self._rate is not None:
            metrics["steps_per_second"] = self._rate
        self._lines.write(json.dumps({"step": step, "seconds": round(now - self._begin, 3), **metrics}) + "\n")
        self._lines.flush()
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)
        total = self._config.steps
        left = "" if self._rate is None else f"  {self._rate:.2f} steps/s  {_clock((total - step) / self._rate)} left"
        named = "  ".join(f"{k} {v:.4g}" for k, v in metrics.items() if k != "steps_per_second")
        line = f"step {step}/{total}  {named}{left}"
        if self._bar:
            self._bar.update(self._task, completed=step, description=line)
        else:
            print(line, flush=True)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return math.inf  # half a line: the process was killed while writing it


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
