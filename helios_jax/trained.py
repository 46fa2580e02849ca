"""The settings that a transformer was trained with, kept in its config.json so that sampling follows them.

diffusers ignores keys with an underscore. A LoRA file of a training run holds the same record in its metadata.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helios_jax import pretrained
from helios_jax.config import ConfigError, from_dict, to_dict
from helios_jax.diffusion.memory import MemoryConfig
from helios_jax.pretrained import CheckpointError

KEY = "_trained"  # of config.json
METADATA = "helios_jax_trained"  # of a LoRA file


@dataclass(unsafe_hash=True)
class Trained:
    """The memory of a training run and, for a distilled student, the steps of each level, coarsest first.

    The defaults are those of the released weights, whose files have no record. `steps` is None unless it is a student;
    with `amplify_first_chunk` the student takes twice as many steps in a video's first chunk. With `training_times` it
    is sampled at the times at which it was trained, else at those of diffusers (`diffusion.levels`).
    """

    memory: MemoryConfig = field(default_factory=MemoryConfig)
    steps: tuple[int, ...] | None = None
    amplify_first_chunk: bool = False
    training_times: bool = False

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


def with_loras(trained: Trained, metadata: Mapping[str, Mapping[str, str]], *, distilled: bool) -> Trained:
    """The settings of a transformer with LoRAs: those that the `metadata` of the LoRA files record, else `trained`.

    A LoRA of stage 1 or 2 says nothing of a student's steps. Raises CheckpointError, in one line, for LoRAs that
    disagree, and for a student's LoRA unless the checkpoint is `distilled`.
    """
    records = {
        name: _parse(json.loads(one[METADATA]), f"{name}: {METADATA}")
        for name, one in metadata.items()
        if METADATA in one
    }
    for name, record in records.items():
        if record.steps is not None and not distilled:
            raise CheckpointError(
                f"{name} was trained for a student of {list(record.steps)} steps: give it to a Distilled checkpoint"
            )
    student = _agreed({name: record for name, record in records.items() if record.steps is not None}, trained)
    memory = _agreed({name: Trained(record.memory) for name, record in records.items()}, trained).memory
    return dataclasses.replace(student, memory=memory)


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
