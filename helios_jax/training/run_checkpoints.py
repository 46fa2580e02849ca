"""Checkpoints of a run: train state, position in the data and config, written by Orbax.

A state is stored as a flat mapping of names ("model/blocks/0/ffn/weight") to arrays, so that a checkpoint does not
depend on Python classes and restores onto any mesh. Frozen parameters are not in it: they are loaded again from where
the run began, and a digest tells when they have changed. Orbax writes into a temporary folder and renames it when all
is on disk: a save that was killed or that failed leaves no checkpoint, and the ones before it stay. A checkpoint whose
files are damaged is set aside under another name, and never deleted.
"""

import contextlib
import dataclasses
import itertools
import logging
import math
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from helios_jax import config as configs
from helios_jax.locations import location, standard
from helios_jax.messages import one_line
from helios_jax.runtime import hosts
from helios_jax.training.errors import RunError, cannot_read, cannot_write, read_again, reading, unreadable
from helios_jax.training.run_config import TrainConfig
from helios_jax.training.state import TrainState

FROZEN, METRIC = "frozen_digest", "metric"
DAMAGED = "damaged"  # the end of the name of a checkpoint that was set aside
UNREADABLE = "unreadable"

Restored = tuple[TrainState, dict[str, Any], dict[str, Any]]  # (state, data state, config as saved)

# Parts of log lines that are dropped. Orbax logs errors that it also raises: of a save in the background, with
# tracebacks, and of files that are missing from a checkpoint. `Checkpoints` reports both in one line.
TOLD_HERE = (
    "_SignalingThread.run() raised",
    "in background save thread",
    "Save Finalize thread",
    "Metadata file does not exist",
    "was found in the checkpoint, but could not be restored",
    "coro=<async_deserialize()",  # of arrays that were being read beside the one that failed
)
for logger in ("absl", "asyncio"):
    logging.getLogger(logger).addFilter(lambda record: not any(part in record.getMessage() for part in TOLD_HERE))


class RestoreError(ValueError):
    """Checkpoints that do not belong to this model, or of which none is whole; the message is one line."""


class Manager(ocp.CheckpointManager):
    """Orbax's manager, changed to raise the error of this host at once.

    Orbax itself would wait for the other hosts first, and they wait for the part that this host cannot write.
    """

    fault: Exception | None = None

    def _wait_for_checkpointers(self) -> None:
        try:
            super()._wait_for_checkpointers()
        except Exception as error:
            self.fault = error
            raise

    def settle(self) -> None:
        """Waits for the save in the background; raises the error of this host's part."""
        while self.is_saving_in_progress() and self.fault is None:
            time.sleep(0.005)
        if self.fault is not None:
            raise self.fault
        self.wait_until_finished()


def latest_step(folder: Path) -> int | None:
    """The step of the newest complete checkpoint in `folder`, which may not exist."""

    def read() -> int | None:
        return max(ocp.utils.checkpoint_steps(standard(folder)), default=None) if folder.is_dir() else None

    with reading(folder):
        return read_again(read)


class Checkpoints:
    """Checkpoints in one folder: the newest `keep`, the `best` of smallest metric, and steps that `every` divides."""

    def __init__(self, folder: str | Path, keep: int, best: int = 0, every: int | None = None):
        policies: list[Any] = [managers.LatestN(keep)]
        tracked: dict[str, Any] = {}
        if every is not None:
            policies.append(managers.EveryNSteps(every))
        if best:
            policies.append(managers.BestN(get_metric_fn=_metric, reverse=True, n=best))
            tracked = {"best_fn": _metric, "best_mode": "min"}
        options = ocp.CheckpointManagerOptions(
            create=True, preservation_policy=managers.AnyPreservationPolicy(policies), **tracked
        )
        self._ranked = best > 0
        self.folder = location(folder).absolute()
        handlers = {
            "state": ocp.StandardCheckpointHandler(),
            "data": ocp.JsonCheckpointHandler(),
            "config": ocp.JsonCheckpointHandler(),
        }
        with reading(self.folder):
            self._manager = Manager(standard(self.folder), options=options, item_handlers=handlers)

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, state: TrainState, data: dict[str, Any], config: TrainConfig, metric: float | None = None) -> None:
        """Writes in the background; `data` is the batch iterator's state, a plain JSON mapping.

        The best checkpoints are those of the smallest `metric`; one without is the worst. Raises RunError when this
        checkpoint, or the one before it, cannot be written.
        """
        step = int(state.step)
        if step == self.latest:
            return
        if metric is None and self._ranked:  # Orbax would keep all that have none
            metric = math.inf
        with self._writing():
            self._manager.settle()
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(_flat(_parts(state))),
                    data=ocp.args.JsonSave(data),
                    config=ocp.args.JsonSave(configs.to_dict(config)),
                ),
                metrics=None if metric is None else {METRIC: metric},
                force=True,
            )

    def restore_newest(self, state: TrainState) -> Restored | None:
        """`restore` of the newest checkpoint whose files are whole; None where there is no checkpoint.

        Newer ones are set aside, each with a warning. Raises RestoreError also when none is whole, and RunError, with
        all checkpoints left as they are, where files cannot be read for another reason than damage.
        """
        damaged: list[tuple[int, str]] = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            found, kind, fault = None, "", ""
            try:
                found = read_again(lambda step=step: self.restore(state, step))
            except (RestoreError, MemoryError, jax.errors.JaxRuntimeError):
                raise
            except Exception as error:  # Orbax, TensorStore and JSON share no base class
                reason = unreadable(error)
                kind = DAMAGED if reason is None else UNREADABLE
                fault = reason or one_line(error).partition(". See full TensorStore details")[0]
            # Each host reads its own part of the arrays, so the parts of other hosts may be damaged.
            told = [text.partition(" ") for text in hosts.gather(f"restored/{step}", f"{kind} {fault}")]
            if reasons := [text for other, _, text in told if other == UNREADABLE]:
                raise cannot_read(self.folder / str(step), reasons[0])
            if reasons := [text for other, _, text in told if other == DAMAGED]:
                damaged.append((step, reasons[0]))
                continue
            self._set_aside(damaged, step)
            return found
        if not damaged:
            return None
        steps, reason = ", ".join(str(step) for step, _ in damaged), damaged[0][1]
        raise RestoreError(
            f"{self.folder}: no checkpoint is whole, of steps {steps}: {reason}; copy the folder again, or give this "
            "run another (run=...)"
        )

    def _set_aside(self, damaged: list[tuple[int, str]], step: int) -> None:
        """Renames damaged checkpoints on the first host, so that their steps can be saved again."""
        for bad, reason in damaged if jax.process_index() == 0 else ():
            path = self.folder / str(bad)
            names = (path.with_name(f"{bad}.{DAMAGED}{'' if i == 1 else f'-{i}'}") for i in itertools.count(1))
            aside = next(name for name in names if not name.exists())
            try:
                path.rename(aside)
            except OSError as error:
                raise cannot_write(aside, error) from None
            warnings.warn(
                f"{path} is damaged: {reason}; it is now {aside.name}, and the run goes on from step {step}",
                stacklevel=2,
            )
        if damaged:
            hosts.of_first(f"set aside before {step}", "")
            self._manager.reload()

    def restore(self, state: TrainState, step: int | None = None) -> Restored:
        """(state, data state, config as saved) of `step` (default: the newest), placed as the given state is.

        `state` may be abstract (`abstract_like`) and on another mesh than the one that wrote the checkpoint; its frozen
        parameters stay. Raises RestoreError when names or shapes differ, or when the frozen parameters have changed.
        """
        step = self.latest if step is None else step
        target = _flat(_parts(state))
        self._check(target, step)
        # Not through the manager: it would make all hosts wait for one that cannot read its part.
        folder = standard(self.folder / str(step))
        arrays: Any = ocp.StandardCheckpointHandler().restore(folder / "state", args=ocp.args.StandardRestore(target))
        data, config = (ocp.JsonCheckpointHandler().restore(folder / name) for name in ("data", "config"))
        if FROZEN in target and not np.array_equal(arrays[FROZEN], state.frozen_digest):
            raise RestoreError(
                f"{self.folder}/{step}: the parameters that are not trained are others now; "
                "give init (or seed) as it was, or this run another folder (run=...)"
            )
        parts = jax.tree.unflatten(jax.tree.structure(_parts(state)), [arrays[name] for name in target])
        done, params, opt_state, ema = (parts[name] for name in ("step", "model", "opt_state", "ema"))
        return (
            dataclasses.replace(state, step=done, params=params, opt_state=opt_state, ema=ema),
            dict(data),
            dict(config),
        )

    def _check(self, target: dict[str, Any], step: int | None) -> None:
        where = f"{self.folder}/{step}"
        if step is None or step not in self._manager.all_steps():
            raise RestoreError(f"{where}: no such checkpoint; the folder has steps {list(self._manager.all_steps())}")
        stored = self._manager.item_metadata(step).state
        if stored is None:
            raise FileNotFoundError(f"{where}/state/_METADATA is missing")
        shapes = {name: tuple(meta.shape) for name, meta in stored.items()}
        differ = [n for n in target if n not in shapes or tuple(target[n].shape) != shapes[n]]
        differ += [n for n in shapes if n not in target]
        if differ:
            raise RestoreError(
                f"{where}: was written by another model, optimiser or average: {differ[0]} and {len(differ) - 1} more "
                "differ; give this run another folder (run=...), or the config and the code that wrote the checkpoint"
            )

    def wait(self) -> None:
        """Returns when every save is on disk; raises RunError for one that cannot be written."""
        with self._writing():
            self._manager.settle()

    def close(self) -> None:
        """Finishes writing; raises RunError for what cannot be written."""
        with self._writing():
            self._manager.settle()
            self._manager.close()

    def kept(self) -> str:
        """Waits for saves in the background; returns a phrase on the checkpoint that a failed run can continue from."""
        with contextlib.suppress(RunError):  # the run has failed already
            self.wait()
        steps = [int(path.name) for path in self.folder.iterdir() if path.name.isdecimal()]
        if not steps:
            return "no checkpoint was written"
        return f"step {max(steps)} in {self.folder} is whole, the same command goes on from it"

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except jax.errors.JaxRuntimeError:
            raise
        except Exception as error:  # Orbax and TensorStore share no base class
            raise cannot_write(self.folder, error) from None


def _metric(metrics: dict[str, float]) -> float:
    return metrics[METRIC]


def _parts(state: TrainState) -> dict[str, Any]:
    """The parts of a state that are stored."""
    return {
        "step": state.step,
        "model": state.params,
        "opt_state": state.opt_state,
        "ema": state.ema,
        FROZEN: state.frozen_digest,
    }


def _flat(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value"): x for path, x in leaves}
