"""A run from its config to its export: checks, builds, restores, trains, exports."""

import importlib.util
import json
import signal
import time
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from helios_jax import config as configs
from helios_jax.config import ConfigError
from helios_jax.locations import location
from helios_jax.runtime import hosts, seeds
from helios_jax.runtime.compilation import precise
from helios_jax.runtime.offload import has_host_memory
from helios_jax.sharding import check_batch, make_mesh
from helios_jax.training import loop
from helios_jax.training.errors import RunError, check_folder, writing
from helios_jax.training.run_checkpoints import Checkpoints, latest_step
from helios_jax.training.run_config import TrainConfig
from helios_jax.training.stage import Stage
from helios_jax.training.state import abstract_like, init_sharded
from helios_jax.training.train_step import make_step


def train(stage: Stage[Any, Any], profiled: int = 0) -> int:
    """Builds, restores, trains and exports; returns the exit code. `profiled` steps are recorded in `<run>/profile`.

    0: done. `stopped_code`: ended by SIGTERM after saving. 130: ended by Ctrl-C after saving. Raises ConfigError,
    CheckpointError or RestoreError for input that cannot be used, and RunError for a run that cannot go on.
    """
    began = time.time()
    config: TrainConfig = stage.config
    run = location(config.run)
    mesh = fit_mesh(config)
    check_hosts(config)
    folder = location(config.checkpoint.folder or run / "checkpoints")
    check_steps(config.steps, folder)
    batches, optimizer = stage.batches(mesh), stage.make_optimizer()
    with jax.set_mesh(mesh), precise(config.precision):
        state = init_sharded(
            stage.init,
            seeds.key(config.seed),
            optimizer,
            config.optim.ema,
            mesh,
            stage.load if config.init else None,
            config.trainable,
            config.precision,
            config.optim.offload,
        )
        say(f"training {count(state.params):,} parameters, {count(state.frozen):,} stay as they are")
        kept = config.checkpoint
        checkpoints = Checkpoints(folder, kept.keep, kept.keep_best, kept.keep_every)
        if checkpoints.latest is not None:
            state = abstract_like(state)  # frees the new state's memory before the old one is read
            restored = checkpoints.restore_newest(state)
            assert restored is not None  # there is a newest one
            state, position, before = restored
            batches.set_state(position)
            changed = changes(before, configs.to_dict(config))
            say(f"resumed at step {int(state.step)} of {checkpoints.folder}{changed}")
        try:
            if jax.process_index() == 0:
                with writing(run / "config.yaml"):
                    configs.save(config, run / "config.yaml")
            step = make_step(stage, optimizer, state, mesh)
            state, stopped = loop.run(step, state, batches, checkpoints, stage, mesh, began, profiled)
            checkpoints.close()
            if stopped is None:
                with writing(run):
                    stage.export(state.best, run)
                # The first host may copy gigabytes; jax ends all hosts when the others have waited 5 minutes at exit.
                hosts.gather("exported", "")
        except RunError as error:
            raise RunError(f"{error}; {checkpoints.kept()}") from None
    if stopped is None:
        return 0
    say(f"{stopped.name}: saved step {int(state.step)} in {checkpoints.folder}; the same command continues")
    return 130 if stopped is signal.SIGINT else config.stopped_code


def fit_mesh(config: TrainConfig) -> Mesh:
    """The mesh over all hosts; raises ConfigError when it fits neither the devices nor the batch."""
    try:
        mesh = make_mesh(config.mesh)
        check_batch(config.data.batch_size // config.optim.accumulate, mesh)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    device = mesh.local_devices[0]
    if config.optim.offload is not None and not has_host_memory(device):
        raise ConfigError(f"optim.offload: {device.device_kind} keeps no arrays in its host's memory; set it to null")
    return mesh


def check_hosts(config: TrainConfig) -> None:
    """Raises ConfigError for folders that cannot be written, or hosts with other settings or folders than the first."""
    if jax.process_count() > 1 and not hosts.several():  # the runtime of a TPU pod knows its hosts without `join`
        raise ConfigError(
            f"mesh.processes is {config.mesh.processes}, but this is one of {jax.process_count()} hosts; "
            "set mesh.processes=null for as many as the cluster says"
        )
    values = configs.to_dict(config)
    if config.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError("wandb: the package is not installed; pip install wandb, or set wandb to null")
    first = json.loads(hosts.of_first("config", json.dumps(values)))
    if differ := changes(first, json.loads(json.dumps(values))):
        raise ConfigError(f"all hosts must have the same settings as host 0{differ} here; give all the same command")
    folders = {"run": location(config.run)}
    folders["checkpoint.folder"] = location(config.checkpoint.folder or folders["run"] / "checkpoints")
    for key, folder in folders.items():
        if jax.process_index() == 0:
            check_folder(folder, key)
        try:
            hosts.check_shared(str(folder), key)
        except ValueError as error:
            raise ConfigError(str(error)) from None


def check_steps(steps: int, folder: Path) -> None:
    """Raises ConfigError where the checkpoints in `folder` are beyond `steps`, the export of which they would be."""
    newest = latest_step(folder) if jax.process_index() == 0 else None
    done = int(hosts.of_first("newest step", str(newest or 0)))
    if done > steps:
        raise ConfigError(
            f"steps is {steps}, but {folder} is at step {done}: set steps={done} to export it, or name another run"
        )


def count(params: Any) -> int:
    """Number of values in a tree of arrays."""
    return sum(x.size for x in jax.tree.leaves(params))


def changes(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> str:
    """Describes the settings of a resumed run that differ from the checkpoint's.

    Keys that only one of the two has are left out: the schema of a stage may have changed since.
    """
    text = ""
    for key in sorted(before.keys() & now.keys()):
        old, new = before[key], now[key]
        if isinstance(old, dict) and isinstance(new, dict):
            text += changes(old, new, f"{prefix}{key}.")
        elif old != new:
            text += f"; {prefix}{key} was {old}, is {new}"
    return text


def say(message: str) -> None:
    """Prints one line on the first host."""
    if jax.process_index() == 0:
        print(message, flush=True)
