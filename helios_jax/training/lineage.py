"""The record of how a run trains its transformer, and its comparison with the record of the weights it starts from.

Stages 1 and 2 can adapt weights, so they warn of a difference. Stage 3 refuses it. What a record leaves out, such as
the kind and the levels of the released weights, is accepted.
"""

import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from helios_jax.config import ConfigError, to_dict
from helios_jax.pretrained import CheckpointError
from helios_jax.trained import NAMES, Levels, Trained, is_later, read_trained, with_loras
from helios_jax.training.flow_config import StudentTrainConfig, TransformerTrainConfig
from helios_jax.training.start import init_folder, is_wan

NOTHING: Mapping[str, Mapping[str, str]] = MappingProxyType({})


def trained(config: TransformerTrainConfig) -> Trained:
    """The settings of a run that sampling must repeat."""
    memory, pyramid = config.flow.memory, config.pyramid
    levels = None if pyramid is None else Levels(pyramid.stage_range, pyramid.gamma)
    if isinstance(config, StudentTrainConfig):
        distill = config.distill
        return Trained(memory, distill.steps, distill.amplify_first_chunk, training_times=True, levels=levels)
    if pyramid is None:
        return Trained(memory, kind="base")
    return Trained(memory, kind="mid", levels=levels, left_out=pyramid.left_out)


def check_init(config: TransformerTrainConfig) -> None:
    """Compares memory, kind and levels of a run with those that the weights in `config.init` were trained with.

    Warns of a difference; for a student it raises ConfigError instead.
    """
    check_memory(config)
    check_levels(config)


def check_memory(config: TransformerTrainConfig, name: str = "init") -> None:
    """The memory's part of `check_init`: a student can learn no other memory from the teacher.

    Messages call `config.init` by `name`.
    """
    theirs = _record(config, name)
    if theirs is None:
        return
    differ = _differences("flow.memory", to_dict(theirs.memory), to_dict(config.flow.memory))
    if differ:
        _tell(config, f"{name}: {config.init} was trained with {differ}", "set flow.memory as it was")


def check_levels(config: TransformerTrainConfig, adapters: Mapping[str, Mapping[str, str]] = NOTHING) -> None:
    """The part of `check_init` about the kind, the levels and a student's steps.

    A run may start from an earlier kind, but a student not from Base: it would have to learn the levels in few steps.
    `adapters` has the metadata, by name, of LoRA files that make another kind of the weights before they are trained.
    """
    before, ours = _record(config, "init"), trained(config)
    if before is None:
        return
    theirs = with_loras(before, adapters, kind=None)
    was = f"init: {config.init} was trained" if not adapters else f"init: {config.init} with its adapters was trained"
    if ours.kind == "distilled":
        theirs.warn_of_left_out(f"init: {config.init}")
    if theirs.kind == "base" and ours.kind == "distilled" and not adapters:
        raise ConfigError(f"{was} as Base, without levels; start a student from a Mid model")
    if theirs.kind is not None and is_later(theirs.kind, ours.kind):
        _tell(config, f"{was} as {NAMES[theirs.kind]}, not {NAMES[ours.kind or 'base']}")
    differ = []
    if theirs.levels is not None and ours.levels is not None:
        differ.append(_differences("flow.pyramid", to_dict(theirs.levels), to_dict(ours.levels)))
    if theirs.steps is not None and ours.steps is not None:
        differ.append(_differences("distill", {"steps": list(theirs.steps)}, {"steps": list(ours.steps)}))
    if told := ", ".join(filter(None, differ)):
        _tell(config, f"{was} with {told}", "set the same here, or start from other weights")


def _record(config: TransformerTrainConfig, name: str) -> Trained | None:
    """The record of the weights that `config.init` names; None without weights of Helios."""
    if config.init is None:
        return None
    try:
        folder = init_folder(config)
        return None if is_wan(folder) else read_trained(folder)
    except CheckpointError as error:
        raise ConfigError(f"{name}: {error}") from None


def _differences(part: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    return ", ".join(f"{part}.{key}={before[key]}, not {now[key]}" for key in now if before[key] != now[key])


def _tell(config: TransformerTrainConfig, told: str, remedy: str = "") -> None:
    """Refuses what is told for a student, else warns of it."""
    if isinstance(config, StudentTrainConfig):
        raise ConfigError(f"{told}; {remedy}")
    warnings.warn(f"{told}; the weights will be adapted to it", stacklevel=3)
