"""Training loop of all stages: batches, progress, metrics, checkpoints and clean ends."""

import contextlib
import json
import math
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from helios_jax.config import ConfigError
from helios_jax.data.records import RecordError
from helios_jax.locations import location
from helios_jax.runtime import hosts, interrupts, seeds
from helios_jax.runtime.profile import Profile
from helios_jax.sharding import put_batch
from helios_jax.training.errors import NotFiniteError, RunError, writing
from helios_jax.training.progress import Reporter
from helios_jax.training.run_checkpoints import Checkpoints
from helios_jax.training.run_config import TrainConfig
from helios_jax.training.stage import Batches, Metrics, Stage
from helios_jax.training.state import TrainState
from helios_jax.training.train_step import Step
from helios_jax.training.work import Meter

LONG = 1.0  # seconds between two steps from which no step is queued behind the one that runs


def run(
    step: Step,
    state: TrainState,
    batches: Batches,
    checkpoints: Checkpoints,
    stage: Stage[Any, Any],
    mesh: Mesh,
    began: float,
    profiled: int = 0,
) -> tuple[TrainState, signal.Signals | None]:
    """Trains until `config.steps`; returns the last state and the signal that ended the run early, if one did.

    SIGTERM and SIGINT finish the step that runs, save and return; a second one ends the process at once. Where steps
    take less than LONG, one that is queued is finished, too. Raises RunError for a NaN or infinite loss or gradient,
    for a record that cannot be used, and for files that cannot be written. Metrics are checked before every save, so
    the checkpoints stay good. The `id` of a batch, the names of its samples, stays on the host, for the message about
    a loss that is not finite. With `config.validation`, the stage's `validate` runs at its interval. `began` is when
    the process began, in seconds since 1970; `profiled` steps are recorded in `<run>/profile`.
    """
    config: TrainConfig = stage.config
    seed_key = seeds.key(config.seed)
    first = done = int(state.step)
    saved: int | None = None
    metrics = before = None
    dispatched, apart = -math.inf, math.inf  # when the last step was dispatched, and how long after the one before
    window: list[tuple[Metrics, list[str]]] = []
    since_save: list[tuple[int, float]] = []  # steps, and the mean of the checkpoints' metric over them
    position = batches.get_state()  # of the steps that are made: a batch is fetched before it is known to be used
    folder = location(config.run)
    meter = Meter(stage, state, mesh)
    reporter = Reporter(folder, first, config, stage.learning_rates, began, meter)
    goodput, profile = reporter.goodput, Profile(folder / "profile", profiled, skipped=2)

    def report() -> None:
        means = _mean(window, done, folder)
        since_save.append((len(window), _metric(means, window, config)))
        reporter.report(done, means)
        window.clear()

    def save() -> None:
        with goodput.losing("saving"):
            checkpoints.save(state, position, config, _average(since_save))
        since_save.clear()

    with _Signals() as signals, reporter, contextlib.closing(profile):
        while done < config.steps:
            begin = time.monotonic()
            try:
                batch, ids = split_ids(next(batches))
            except RecordError as error:
                raise RunError(f"step {done + 1}: {error}") from None
            if metrics is not None and metrics["loss"].is_ready():  # the devices wait for data, too
                goodput.lose("input", time.monotonic() - begin)
            placed = put_batch(batch, config.data.batch_size, mesh)
            # One step is queued behind the one that runs. Behind a long one none is: it would be made after a signal.
            jax.block_until_ready(before if apart < LONG else metrics)
            if signals.ask():
                if saved != done:
                    report()
                    save()
                break
            before = metrics
            state, metrics = step(state, placed, seed_key)
            apart, dispatched = time.monotonic() - dispatched, time.monotonic()
            if jax.process_index() == 0:
                meter.add(placed, done)  # while the devices work
            done += 1
            position = batches.get_state()
            profile.after_step(metrics)
            window.append((metrics, ids))
            log = done % config.log_every == 0 or done == first + 1 or done == config.steps
            due = done % config.checkpoint.every == 0 or done == config.steps
            validate = config.validation is not None and done % config.validation.every == 0
            if log or due or validate:
                report()
            if due:
                save()
                saved = done
            if validate:
                videos = folder / "validation" / f"step_{done:06d}"
                with goodput.losing("validation"):
                    with writing(videos):
                        pictures = stage.validate(state.best, videos, signals.ask)
                    reporter.pictures(done, pictures)
    checkpoints.wait()
    return state, signals.agreed


def split_ids(batch: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Splits a batch into (its arrays, the names of its samples)."""
    return {name: x for name, x in batch.items() if name != "id"}, [str(name) for name in batch.get("id", ())]


def _mean(window: list[tuple[Metrics, list[str]]], done: int, run: Path) -> dict[str, float]:
    """Means over the steps since the last report, after checking that all of them are finite."""
    first = done + 1 - len(window)
    values = jax.device_get([metrics for metrics, _ in window])
    for i, (metrics, (_, ids)) in enumerate(zip(values, window)):
        for name in ("loss", "grad_norm"):
            if not math.isfinite(metrics[name]):
                raise _not_finite(first + i, name, float(metrics[name]), ids, run)
    means = {}
    for name in _names(window):
        pairs = [x if isinstance(x := metrics[name], tuple) else (x, 1) for metrics in values]
        total, weight = np.sum(np.asarray(pairs, np.float64), 0)
        if weight > 0:
            means[name] = float(total / weight)
    return means


def _metric(means: dict[str, float], window: list[tuple[Metrics, list[str]]], config: TrainConfig) -> float:
    """The metric by which checkpoints are kept; NaN where no step of the window had a part in its mean.

    Raises ConfigError for one that the stage does not have.
    """
    name = config.checkpoint.metric
    if config.checkpoint.keep_best and window and name not in _names(window):
        raise ConfigError(f"checkpoint.metric: there is no {name!r}; name one of {', '.join(_names(window))}")
    return means.get(name, math.nan)


def _names(window: list[tuple[Metrics, list[str]]]) -> list[str]:
    """The names of all metrics, the loss first."""
    return sorted(window[0][0], key=lambda name: (name != "loss", name)) if window else []


def _average(parts: list[tuple[int, float]]) -> float | None:
    """The mean over all steps, from pairs (number of steps, mean over them); None where no mean is finite."""
    known = [(steps, mean) for steps, mean in parts if steps and math.isfinite(mean)]
    return sum(steps * mean for steps, mean in known) / sum(steps for steps, _ in known) if known else None


def _not_finite(step: int, name: str, value: float, ids: list[str], run: Path) -> NotFiniteError:
    """The error for a step, after writing the whole batch's ids beside the metrics."""
    batch = ""
    if ids:
        path = run / f"not_finite_{jax.process_index()}.json"
        with writing(path):
            path.write_text(json.dumps({"step": step, name: str(value), "ids": ids}, indent=2) + "\n")
        rest = f" and {len(ids) - 4} more" if len(ids) > 4 else ""
        batch = f"its batch is {', '.join(ids[:4])}{rest}, see {path}; "
    return NotFiniteError(
        f"step {step}: {name} is {value}; {batch}lower optim.lr, clip with optim.clip_norm, or look at the data"
    )


class _Signals:
    """Remembers SIGTERM and SIGINT; a second one has the effect that it has outside this context."""

    def __enter__(self) -> "_Signals":
        self._seen: signal.Signals | None = None
        self.agreed: signal.Signals | None = None
        self._asked = 0
        self._paused, self._several = interrupts.pause(), hosts.several()
        # With several hosts, jax's preemption service catches SIGTERM: `hosts.agreed_signal`.
        mine = (signal.SIGINT,) if self._several else (signal.SIGTERM, signal.SIGINT)
        self._before = {s: signal.signal(s, self._note) for s in mine}
        return self

    def _note(self, number: int, frame: Any) -> None:
        self._seen = signal.Signals(number)
        self.__exit__()
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)  # tells the other hosts

    def __exit__(self, *error: Any) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)
        interrupts.resume(self._paused)

    def ask(self) -> bool:
        """True from the moment when all hosts know of a signal that one of them got; `agreed` is that signal.

        All hosts must ask at the same points of the run; the answer is the same on all.
        """
        if self.agreed is None:
            self._asked += 1
            self.agreed = hosts.agreed_signal(self._asked, self._seen) if self._several else self._seen
        return self.agreed is not None
