"""The settings that a transformer was trained with, kept in its config.json so that sampling follows them.

diffusers ignores keys with an underscore. A LoRA file of a training run holds the same record in its metadata.
"""

import dataclasses
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from helios_jax import pretrained
from helios_jax.config import ConfigError, from_dict, require, to_dict
from helios_jax.diffusion.memory import MemoryConfig
from helios_jax.pretrained import CheckpointError

KEY = "_trained"  # of config.json
METADATA = "helios_jax_trained"  # of a LoRA file
Kind = Literal["base", "mid", "distilled"]
NAMES: dict[Kind, str] = {"base": "Base", "mid": "Mid (pyramid)", "distilled": "Distilled"}  # in the order of training


def is_later(kind: Kind | None, other: Kind | None) -> bool:
    """Tells if `kind` is trained after `other`; not where one of them is unknown."""
    order = list(NAMES)
    return kind is not None and other is not None and order.index(kind) > order.index(other)


@dataclass(unsafe_hash=True)
class Levels:
    """Levels of a pyramid, by the names of `flow.pyramid` and scheduler_config.json, rounded so that they compare."""

    stage_range: tuple[float, ...]
    gamma: float

    def __post_init__(self):
        self.stage_range = tuple(round(float(end), 5) for end in self.stage_range)
        self.gamma = round(float(self.gamma), 5)

    def __str__(self) -> str:
        return f"stage_range {list(self.stage_range)} and gamma {self.gamma}"


@dataclass(unsafe_hash=True)
class Trained:
    """The memory of a training run, its kind and levels and, for a student, the steps of each level, coarsest first.

    The defaults are those of the released weights, whose files have no record. `steps` is None unless it is a student;
    with `amplify_first_chunk` the student takes twice as many steps in a video's first chunk. With `training_times` it
    is sampled at the times at which it was trained, else at those of diffusers (`diffusion.levels`). `kind` and
    `levels` are None where they are unknown, as of the released weights; Base has no levels. `left_out` are the levels
    that the last run did not train.
    """

    memory: MemoryConfig = field(default_factory=MemoryConfig)
    steps: tuple[int, ...] | None = None
    amplify_first_chunk: bool = False
    training_times: bool = False
    kind: Kind | None = None
    levels: Levels | None = None
    left_out: tuple[int, ...] = ()

    def __post_init__(self):
        if self.steps is not None:
            require(self.kind in (None, "distilled"), f"kind must be distilled where there are steps, got {self.kind}")
            self.kind = "distilled"

    def warn_of_left_out(self, source: object) -> None:
        """Warns of levels that the last run of what `source` names left out."""
        if self.left_out:
            warnings.warn(
                f"{source}: training left out the levels {list(self.left_out)} (flow.pyramid.sample_ratios), which make"
                " noise unless an earlier run trained them",
                stacklevel=3,
            )

    def entries(self) -> dict[str, Any]:
        """The record as entries of config.json; none for the settings of the released weights."""
        return {} if self == Trained() else {KEY: to_dict(self)}

    def metadata(self) -> dict[str, str]:
        """The record as metadata of a LoRA file."""
        return {METADATA: json.dumps(to_dict(self))}


def read_trained(folder: Path) -> Trained:
    """The record of the transformer in `folder`. Raises CheckpointError, in one line, for one that cannot be read."""
    values = pretrained.read_json(folder / "config.json").get(KEY)
    return Trained() if values is None else _parse(values, f"{folder / 'config.json'}: {KEY}")


def with_loras(trained: Trained, metadata: Mapping[str, Mapping[str, str]], *, kind: Kind | None) -> Trained:
    """The settings of a transformer with LoRAs: those that the `metadata` of the LoRA files record, else `trained`.

    A LoRA of an earlier stage says nothing of a student's steps. Warns of levels that a LoRA's run left out. Raises
    CheckpointError, in one line, for LoRAs that disagree, and for a LoRA of a later kind than the checkpoint's
    `kind`, None for a transformer alone.
    """
    records = {
        name: _parse(json.loads(one[METADATA]), f"{name}: {METADATA}")
        for name, one in metadata.items()
        if METADATA in one
    }
    latest = trained.kind
    for name, record in records.items():
        record.warn_of_left_out(name)
        if kind is not None and record.kind is not None and is_later(record.kind, kind):
            wanted = NAMES[record.kind]
            raise CheckpointError(
                f"{name} was trained for {wanted}, and this checkpoint is {NAMES[kind]}: give it to a {wanted} one"
            )
        # A LoRA of an earlier kind may stand on weights of a later one, also where theirs is unknown.
        if record.kind is not None and (record.kind == kind or is_later(record.kind, latest)):
            latest = record.kind
    known = {name: Trained(levels=record.levels) for name, record in records.items() if record.levels is not None}
    students = {
        name: dataclasses.replace(record, levels=None) for name, record in records.items() if record.steps is not None
    }
    memory = {name: Trained(record.memory) for name, record in records.items()}
    return dataclasses.replace(
        _agreed(students, trained),
        memory=_agreed(memory, trained).memory,
        kind=latest,
        levels=_agreed(known, trained).levels,
    )


def _agreed(records: Mapping[str, Trained], default: Trained) -> Trained:
    """The record that all LoRAs have, by their names; `default` without LoRAs."""
    if len({*records.values()}) > 1:
        raise CheckpointError(
            f"{' and '.join(records)} were trained with different settings ({differences(*records.values())}): use one"
        )
    return next(iter(records.values()), default)


def differences(*records: Any) -> str:
    """The settings in which dataclasses of one class differ, with their values: "positions relative, absolute"."""
    flat = [_flat(dataclasses.asdict(record)) for record in records]
    differ = [key for key in flat[0] if len({str(one[key]) for one in flat}) > 1]
    return "; ".join(f"{key} {' and '.join(str(one[key]) for one in flat)}" for key in differ)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _parse(values: Any, source: str) -> Trained:
    try:
        return from_dict(values, Trained, source)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
