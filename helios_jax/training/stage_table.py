"""Stages of configs: their classes by name, and loading of a config in the schema of its stage."""

import inspect
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helios_jax import config as configs
from helios_jax.config import ConfigError, did_you_mean
from helios_jax.config_types import unknown_part
from helios_jax.training.run_config import TrainConfig
from helios_jax.training.stage import Stage
from helios_jax.training.stage_names import STAGES

OF_SAMPLING = ("prompt", "csv", "image", "video", "out")  # keys that configs of sampling have, and those of no stage


def find_stage(name: str) -> type[Stage[Any, Any]]:
    """The class of a stage: a name of STAGES, or the dotted path of a class, as in my.module.MyStage.

    Raises ConfigError, in one line, when there is none or when it is not a Stage.
    """
    if name in STAGES:
        return pkgutil.resolve_name(STAGES[name].path)
    module, _, member = name.rpartition(".")
    if not module:
        names = ", ".join(STAGES)
        raise ConfigError(
            f"stage: must be one of {names}, or the dotted path of a class of yours, as in my.module.MyStage; "
            f"got {name!r}{did_you_mean(name, list(STAGES))}"
        )
    try:
        found: Any = pkgutil.resolve_name(f"{module}:{member}")
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"stage: {name} cannot be imported, give the dotted path of a class; {error}") from None
    if not (inspect.isclass(found) and issubclass(found, Stage)):
        raise ConfigError(f"stage: {name} must be a subclass of helios_jax.training.stage.Stage; derive it from that")
    missing = sorted(found.__abstractmethods__)
    if found.loss is Stage.loss and found.players is Stage.players:
        missing.append("loss (or players)")
    if missing:
        raise ConfigError(f"stage: {name} must have all methods of a stage; add {', '.join(missing)}")
    return found


def make_stage(config: TrainConfig) -> Stage[Any, Any]:
    """The stage that a config names."""
    return find_stage(config.stage)(config)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The config of a run, in the schema of the stage that the file, its bases or the overrides name.

    Raises ConfigError, in one line, as `helios_jax.config.load` does, and for keys that only other stages read.
    """
    named = configs.peek(path, overrides, "stage")
    for key in OF_SAMPLING if named is None else ():
        if (found := configs.peek(path, overrides, key)) is not None:
            remedy = f"run python sample.py {path}, or name a config of training"
            raise ConfigError(f"{found[1]}: {key}: is of sampling; {remedy}")
    name, source = named or (TrainConfig.stage, str(path))
    if not isinstance(name, str):
        raise ConfigError(f"{source}: stage: must be a name, as in flow, got {name!r}")
    try:
        stage = find_stage(name)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    try:
        return configs.load(path, overrides, stage.Config)
    except ConfigError:
        _refuse_unread(path, overrides, name, stage)
        raise


def _refuse_unread(path: str | Path, overrides: Sequence[str], name: str, stage: type[Stage[Any, Any]]) -> None:
    """Raises ConfigError for the keys of a file or an override that other stages read, and `stage` does not."""
    others = {other: find_stage(other).Config for other in STAGES}
    file = str(configs.find(path))
    for source, unknown in configs.unknown(path, overrides, stage.Config):
        readers = {key: [other for other in others if unknown_part(others[other], key) is None] for key in unknown}
        unread = [key for key in unknown if readers[key]]
        if not unread:
            continue
        common = [other for other in others if all(other in readers[key] for key in unread)]
        who = f", only {' and '.join(common)} {'does' if len(common) == 1 else 'do'}" if common else ""
        it = "it" if len(unread) == 1 else "them"
        base = "" if source == file or source.startswith("override ") else f", or give {file} another base"
        raise ConfigError(
            f"{source}: {', '.join(unread)}: the stage {name} does not read {it}{who}; leave {it} out{base}"
        )
