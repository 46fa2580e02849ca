"""Checkpoints of a run: train state, position in the data and config, written by Orbax.

A state is stored as a flat mapping of names ("model/blocks/0/ffn/weight") to arrays, so that a checkpoint does not
depend on Python classes and restores onto any mesh. Frozen parameters are not in it: they are loaded again from where
the run began, and a digest tells when they have changed. Orbax writes into a temporary folder and renames it when all
is on disk: a save that was killed leaves no checkpoint, and the ones before it stay.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from helios_jax import config as configs
from helios_jax.training.run_config import TrainConfig
from helios_jax.training.state import TrainState

FROZEN = "frozen_digest"


class RestoreError(ValueError):
    """A checkpoint that does not belong to this model; the message is one line."""


class Checkpoints:
    """The checkpoints in one folder, the newest `keep` of them."""

    def __init__(self, folder: str | Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self.folder = Path(folder).absolute()
        handlers = {
            "state": ocp.StandardCheckpointHandler(),
            "data": ocp.JsonCheckpointHandler(),
            "config": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, state: TrainState, data: dict[str, Any], config: TrainConfig) -> None:
        """Writes in the background; `data` is the batch iterator's state, a plain JSON mapping."""
        step = int(state.step)
        if step == self.latest:
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_flat(_parts(state))),
                data=ocp.args.JsonSave(data),
                config=ocp.args.JsonSave(configs.to_dict(config)),
            ),
            force=True,
        )

    def restore(self, state: TrainState, step: int | None = None) -> tuple[TrainState, dict[str, Any], dict[str, Any]]:
        """(state, data state, config as saved) of `step` (default: the newest), placed as the given state is.

        `state` may be abstract (`abstract_like`) and on another mesh than the one that wrote the checkpoint; its frozen
        parameters stay. Raises RestoreError when names or shapes differ, or when the frozen parameters have changed.
        """
        step = self.latest if step is None else step
        target = _flat(_parts(state))
        self._check(target, step)
        got: Any = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(target), data=ocp.args.JsonRestore(), config=ocp.args.JsonRestore()
            ),
        )
        if FROZEN in target and not np.array_equal(got.state[FROZEN], state.frozen_digest):
            raise RestoreError(
                f"{self.folder}/{step}: the parameters that are not trained are others now; "
                "give init (or seed) as it was, or this run another folder (run=...)"
            )
        parts = jax.tree.unflatten(jax.tree.structure(_parts(state)), [got.state[name] for name in target])
        done, params, opt_state, ema = (parts[name] for name in ("step", "model", "opt_state", "ema"))
        return dataclasses.replace(state, step=done, params=params, opt_state=opt_state, ema=ema), got.data, got.config

    def _check(self, target: dict[str, Any], step: int | None) -> None:
        where = f"{self.folder}/{step}"
        stored = self._manager.item_metadata(step).state if step is not None else None
        if stored is None:
            raise RestoreError(f"{where}: no such checkpoint; the folder has steps {list(self._manager.all_steps())}")
        shapes = {name: tuple(meta.shape) for name, meta in stored.items()}
        differ = [n for n in target if n not in shapes or tuple(target[n].shape) != shapes[n]]
        differ += [n for n in shapes if n not in target]
        if differ:
            raise RestoreError(
                f"{where}: was written by another model, optimiser or average: {differ[0]} and {len(differ) - 1} more "
                "differ; give this run another folder (run=...), or the config and the code that wrote the checkpoint"
            )

    def wait(self) -> None:
        """Returns when every save is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finishes writing."""
        self._manager.close()


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
