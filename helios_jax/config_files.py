"""Reads the YAML of configs within bounds: of size, of nesting, and of the number of values with aliases expanded."""

import io
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from helios_jax.messages import one_line

MOST_BYTES = 1_000_000  # our longest config has 3,000
MOST_NESTED = 50  # parsers recurse, and crash on many more
MOST_VALUES = 10_000
# ValueError: numbers of thousands of digits, and dates that do not exist.
UNREADABLE = (yaml.YAMLError, OmegaConfBaseException, ValueError)


class Excess(ValueError):
    """YAML past the bounds, which is not parsed."""


def read(path: Path) -> Any:
    """The contents of a YAML file; raises ValueError, in one line without the path, for one that cannot be used."""
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror}); name another file") from None
    if len(data) > MOST_BYTES:
        raise ValueError(f"is larger than {MOST_BYTES // 1_000_000} MB; name a config")
    try:
        text = data.decode("utf-8-sig")
        check(text, whole=True)
        return OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))
    except Excess:
        raise
    except UNREADABLE as error:
        raise ValueError(f"not valid YAML: {one_line(error)}") from None


def read_override(text: str) -> Any:
    """The values of key=value; raises ValueError as `read` does."""
    key, _, value = text.partition("=")
    if key.count(".") + key.count("[") > MOST_NESTED:
        raise ValueError(f"is nested more than {MOST_NESTED} deep; name a key of the config")
    try:
        check(value)
        return OmegaConf.to_container(OmegaConf.from_dotlist([text]))
    except Excess:
        raise
    except UNREADABLE as error:
        raise ValueError(f"cannot read the value: {one_line(error)}") from None


def check(text: str, *, whole: bool = False) -> None:
    """Raises Excess for YAML past the bounds, and YAMLError for text that is not YAML. Does not recurse.

    Of a `whole` file, it also raises Excess for a single value in place of `key: value` pairs.
    """
    sizes: dict[str, int] = {}  # values of each anchor, aliases in it written out
    open_: list[tuple[str | None, int]] = []  # anchor of each collection that is open, and the values before it
    values = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            values += sizes.get(str(event.anchor), 0)
        elif isinstance(event, yaml.ScalarEvent):
            if whole and not open_:
                raise Excess("must hold `key: value` pairs, not one value")
            values += 1
            if event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            open_.append((event.anchor, values))
            values += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_.pop()
            if anchor:
                sizes[anchor] = values - before
        if len(open_) > MOST_NESTED:
            raise Excess(f"is nested more than {MOST_NESTED} deep; close the brackets")
        if values > MOST_VALUES:
            raise Excess(f"holds more than {MOST_VALUES} values, with its aliases written out; leave some out")
