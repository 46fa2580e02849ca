"""The loop that every stage shares: one jitted step, batches, progress, metrics, checkpoints, and clean ends."""

import json
import math
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from tensorboardX import SummaryWriter

from helios_jax.runtime import seeds
from helios_jax.sharding import BATCH, put_batch, shardings
from helios_jax.training.optim import learning_rate
from helios_jax.training.run_checkpoints import Checkpoints
from helios_jax.training.run_config import TrainConfig
from helios_jax.training.stage import Batches, Metrics, Stage
from helios_jax.training.state import TrainState, update

Step = Callable[[TrainState, Any, jax.Array], tuple[TrainState, Metrics]]


class NotFiniteError(ArithmeticError):
    """A loss or gradient that is NaN or infinite; the message is one line."""


def make_step(stage: Stage[Any, Any], optimizer: optax.GradientTransformation, state: TrainState, mesh: Mesh) -> Step:
    """The jitted `(state, batch, seed key) -> (state, metrics)`; the new state takes the memory of the old one.

    Each sample of a step has its own key, from `fold_in(seed key, step)`: a resumed run has the draws of an
    uninterrupted one, and one that accumulates gradients those of a whole batch.
    """
    config: TrainConfig = stage.config
    placed, parts = shardings(state, mesh), config.optim.accumulate

    def step(state: TrainState, batch: Any, seed_key: jax.Array) -> tuple[TrainState, Metrics]:
        keys = jax.random.split(jax.random.fold_in(seed_key, state.step), len(jax.tree.leaves(batch)[0]))

        def gradient(batch: Any, keys: jax.Array) -> Any:
            """((loss, sums and divisors of the metrics), gradients)."""

            def loss(params: Any) -> tuple[jax.Array, Metrics]:
                model = nnx.merge(state.graph, params, state.frozen)
                value, metrics = stage.loss(model, {**batch, "step": state.step}, keys)
                return value, {name: x if isinstance(x, tuple) else (x, 1) for name, x in metrics.items()}

            return jax.value_and_grad(loss, has_aux=True)(state.params)

        if parts == 1:
            (loss, metrics), grads = gradient(batch, keys)
        else:
            (loss, metrics), grads = _accumulate(gradient, (batch, keys), parts, placed.params, mesh)
            loss, grads = jax.tree.map(lambda x: x / parts, (loss, grads))
        metrics = {"loss": loss, "grad_norm": optax.global_norm(grads), **metrics}
        return update(state, grads, optimizer, config.optim.ema), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(placed, None))


def _accumulate(gradient: Callable[..., Any], inputs: Any, parts: int, placed: Any, mesh: Mesh) -> Any:
    """The sums of `gradient` over `parts` parts of a batch, one part after the other."""
    sharding = NamedSharding(mesh, PartitionSpec(None, BATCH))

    def divide(x: jax.Array) -> jax.Array:
        # Part i is every parts-th sample: no sample leaves its device.
        x = x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(x, sharding)

    def add(total: Any, part: Any) -> tuple[Any, None]:
        total = jax.tree.map(jnp.add, total, gradient(*part))
        return (total[0], jax.lax.with_sharding_constraint(total[1], placed)), None

    divided = jax.tree.map(divide, inputs)
    shapes = jax.eval_shape(gradient, *jax.tree.map(lambda x: x[0], divided))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, zeros, divided)[0]


def run(
    step: Step,
    state: TrainState,
    batches: Batches,
    checkpoints: Checkpoints,
    stage: Stage[Any, Any],
    mesh: Mesh,
) -> tuple[TrainState, signal.Signals | None]:
    """Trains until `config.steps`; returns the last state and the signal that ended the run early, if one did.

    SIGTERM and SIGINT finish the step, save and return; a second one ends the process at once. A NaN or infinite loss
    or gradient raises NotFiniteError: metrics are checked before every save, so the checkpoints stay good. The `id` of
    a batch, names of its samples, stays on the host: that error prints it. With `config.validation`, the stage's
    `validate` runs at its interval.
    """
    config: TrainConfig = stage.config
    seed_key = seeds.key(config.seed)
    first = done = int(state.step)
    window: list[tuple[Metrics, list[str]]] = []
    reporter = Reporter(Path(config.run), first, config)
    with _Signals() as signals, reporter:
        while done < config.steps:
            batch, ids = split_ids(next(batches))
            state, metrics = step(state, put_batch(batch, mesh), seed_key)
            done += 1
            window.append((metrics, ids))
            log = done % config.log_every == 0 or done == first + 1 or done == config.steps
            # Hosts must agree to stop; they ask one another only where they wait for the device anyway.
            stop = signals.received(agree=log)
            save = done % config.checkpoint.every == 0 or done == config.steps or stop is not None
            look = config.validation is not None and done % config.validation.every == 0
            if log or save or look:
                reporter.report(done, _mean(window, done, checkpoints, Path(config.run)))
                window = []
            if save:
                checkpoints.save(state, batches.get_state(), config)
            if stop is not None:
                break
            if look:
                folder = Path(config.run) / "validation" / f"step_{done:06d}"
                reporter.pictures(done, stage.validate(state.best, folder))
    checkpoints.wait()
    return state, signals.received(agree=False) if done < config.steps else None


def split_ids(batch: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(batch without the names of its samples, those names)."""
    return {name: x for name, x in batch.items() if name != "id"}, [str(name) for name in batch.get("id", ())]


def _mean(window: list[tuple[Metrics, list[str]]], done: int, checkpoints: Checkpoints, run: Path) -> dict[str, float]:
    """Means over the steps since the last report, after checking that all of them are finite."""
    first = done + 1 - len(window)
    values = jax.device_get([metrics for metrics, _ in window])
    for i, (metrics, (_, ids)) in enumerate(zip(values, window)):
        for name in ("loss", "grad_norm"):
            if not math.isfinite(metrics[name]):
                raise _not_finite(first + i, name, float(metrics[name]), ids, checkpoints, run)
    names = sorted(values[0], key=lambda name: (name != "loss", name)) if values else []
    means = {}
    for name in names:
        pairs = [x if isinstance(x := metrics[name], tuple) else (x, 1) for metrics in values]
        total, weight = np.sum(np.asarray(pairs, np.float64), 0)
        if weight > 0:
            means[name] = float(total / weight)
    return means


def _not_finite(
    step: int, name: str, value: float, ids: list[str], checkpoints: Checkpoints, run: Path
) -> NotFiniteError:
    """The error for a step, after writing the whole batch's ids beside the metrics."""
    checkpoints.wait()
    good = checkpoints.latest
    kept = "no checkpoint was written" if good is None else f"step {good} in {checkpoints.folder} is good"
    batch = ""
    if ids:
        path = run / f"not_finite_{jax.process_index()}.json"
        path.write_text(json.dumps({"step": step, name: str(value), "ids": ids}, indent=2) + "\n")
        rest = f" and {len(ids) - 4} more" if len(ids) > 4 else ""
        batch = f"its batch is {', '.join(ids[:4])}{rest}, see {path}; "
    return NotFiniteError(
        f"step {step}: {name} is {value}; {batch}{kept}; lower optim.lr, clip with optim.clip_norm, or look at the data"
    )


class _Signals:
    """Remembers SIGTERM and SIGINT; a second one acts as it does without this class."""

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
        """The signal to act on; of several hosts, one that any of them got, known where all of them ask (`agree`)."""
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
        # A run that was killed after its last checkpoint repeats those steps: their lines are removed.
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
        """Shows and writes the means of the steps since the last report."""
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

    def pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Puts uint8 [h, w, 3] of a validation into TensorBoard; its time does not count as the steps'."""
        self._last = (step, time.monotonic())
        if self._writes:
            for name, picture in pictures.items():
                self._board.add_image(f"validation/{name}", picture, step, dataformats="HWC")


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return math.inf  # half a line: the process was killed while writing it


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
