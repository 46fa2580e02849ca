"""Options of sampling on the command lines that score and show the toy's models."""

import dataclasses
from collections.abc import Mapping, Sequence

from helios_jax.config import ConfigError
from helios_jax.config_types import did_you_mean
from helios_jax.sampling.options import SamplingOptions


def check_overrides(overrides: Sequence[str], flags: Mapping[str, str]) -> None:
    """Raises ConfigError for an override that would change nothing: of the model, the prompts or the files.

    `flags` are a command's own, by the keys that they stand for.
    """
    options = [field.name for field in dataclasses.fields(SamplingOptions) if field.name not in flags]
    for text in overrides:
        key, equals, _ = text.partition("=")
        if equals and key in flags:
            raise ConfigError(f"override {text!r}: {key} is set by a flag: give {flags[key]}")
        if equals and key not in options:  # without =, it is `load` that says what an override looks like
            remedy = did_you_mean(key, options) or f"; leave it out, or give one of {', '.join(options)}"
            raise ConfigError(f"override {text!r}: {key} is no option that is taken here{remedy}")
