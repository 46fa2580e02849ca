"""Train one stage: python train.py configs/toy/vae.yaml optim.lr=1e-3

Everything about the run is in its config; `key=value` arguments override it. The stage is a module that offers

    init(config, key) -> model                      random parameters; traced, so that it can be made in shards
    load(config, model, shardings) -> model         the abstract model filled from config.init, in its dtypes
    batches(config) -> iterator                     numpy batches of this host, with get_state and set_state
    loss(model, batch, keys, config) -> (loss, metrics)     a mean over samples; one key for each, and batch["step"]
    make_optimizer(config) -> optimizer             optional: one of the stage's own, in place of optim's AdamW
    export(model, config, folder)                   optional: what the run is for, in diffusers layout
    validate(model, config, folder) -> pictures     optional: what the model makes by now

A run that finds checkpoints in its folder continues from the newest. Exit code 0 when done or ended by SIGTERM (after
saving), 130 by Ctrl-C (after saving), 1 when the loss stopped being finite, 2 for input that cannot be used.
"""

import argparse
import importlib
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax

from helios_jax import config as configs
from helios_jax.config import ConfigError
from helios_jax.pretrained import CheckpointError
from helios_jax.runtime.compilation import precise
from helios_jax.sharding import check_batch, join_hosts, make_mesh
from helios_jax.training import loop
from helios_jax.training.checkpoint import Checkpoints, RestoreError
from helios_jax.training.config import TrainConfig
from helios_jax.training.optim import make_optimizer
from helios_jax.training.state import abstract_like, init_sharded


def main(argv: list[str]) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="train.py", description="Train one stage of Helios.")
    parser.add_argument("config", help="a YAML file of configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as in optim.lr=1e-4 run=runs/mine")
    args = parser.parse_args(argv)
    try:
        config = configs.load(args.config, args.overrides, TrainConfig)
        name = config.stage if "." in config.stage else f"helios_jax.training.stages.{config.stage}"
        return train(config, importlib.import_module(name))
    except ConfigError as error:
        return fail(error, 2)


def train(config: TrainConfig, stage: Any) -> int:
    """Build, restore, loop, export."""
    run = Path(config.run)
    try:
        mesh = fit_mesh(config)
        batches = stage.batches(config)
        own = getattr(stage, "make_optimizer", None)
        optimizer = own(config) if own else make_optimizer(config.optim, config.steps)
        load = partial(stage.load, config) if config.init else None
        with jax.set_mesh(mesh), precise(config.precision):
            state = init_sharded(
                partial(stage.init, config),
                jax.random.key(config.seed),
                optimizer,
                config.optim.ema,
                mesh,
                load,
                config.trainable,
                config.precision,
            )
            say(f"training {count(state.params):,} parameters, {count(state.frozen):,} stay as they are")
            checkpoints = Checkpoints(config.checkpoint.folder or run / "checkpoints", config.checkpoint.keep)
            if checkpoints.latest is not None:
                state = abstract_like(state)  # what was made is let go first
                state, position, before = checkpoints.restore(state)
                batches.set_state(position)
                changed = changes(before, configs.to_dict(config))
                say(f"resumed at step {int(state.step)} of {checkpoints.folder}{changed}")
            if jax.process_index() == 0:
                configs.save(config, run / "config.yaml")
            step = loop.make_step(stage, config, optimizer, state, mesh)
            validate = getattr(stage, "validate", None)
            state, stopped = loop.run(step, state, batches, checkpoints, config, mesh, validate)
            checkpoints.close()
        if stopped is not None:
            say(f"{stopped.name}: saved step {int(state.step)} in {checkpoints.folder}; the same command continues")
            return 130 if stopped is signal.SIGINT else 0
        if hasattr(stage, "export"):
            stage.export(state.best, config, run)
        return 0
    except loop.NotFiniteError as error:
        return fail(error, 1)
    except (RestoreError, CheckpointError) as error:
        return fail(error, 2)


def fit_mesh(config: TrainConfig) -> Any:
    """The mesh over all hosts, or a ConfigError when it fits neither the devices nor the batch."""
    try:
        join_hosts(config.mesh.processes)
        mesh = make_mesh(config.mesh)
        check_batch(config.data.batch_size // config.optim.accumulate, mesh)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return mesh


def count(params: Any) -> int:
    """Numbers in a tree."""
    return sum(x.size for x in jax.tree.leaves(params))


def changes(before: dict, now: dict, prefix: str = "") -> str:
    """Describes the changes in the config of a resumed run."""
    text = ""
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            text += changes(old, new, f"{prefix}{key}.")
        elif old != new:
            text += f"; {prefix}{key} was {old}, is {new}"
    return text


def say(message: str) -> None:
    """One line for the person who watches, from the first host."""
    if jax.process_index() == 0:
        print(message, flush=True)


def fail(error: Exception, code: int) -> int:
    """One line on stderr, and the exit code."""
    print(f"train.py: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
