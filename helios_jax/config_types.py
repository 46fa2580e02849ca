"""Types of config fields in plain English, and the place where a value does not fit its type."""

import dataclasses
import difflib
import math
from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

WORDS = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "values true or false"),
    str: ("a text", "texts"),
}
# As YAML 1.1 and OmegaConf read them.
TRUE, FALSE = ("yes", "y", "on", "true", "1"), ("no", "n", "off", "false", "0")
LONGEST = 80  # characters of a value in a message


def options(hint: Any) -> tuple[Any, ...]:
    """The types that a union allows, or the type itself."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def describe(hint: Any, many: bool = False) -> str:
    """A type in plain English, such as "a whole number or null"; `many`: "whole numbers"."""
    kinds = options(hint)
    if NoneType in kinds or len(kinds) > 1:
        names = [describe(kind, many) for kind in kinds if kind is not NoneType]
        return " or ".join(names + ["null"] * (NoneType in kinds))
    if hint in WORDS:
        return WORDS[hint][many]
    if dataclasses.is_dataclass(hint):
        keys = ", ".join(f.name for f in dataclasses.fields(hint))
        return f"{'groups' if many else 'a group'} of keys ({keys})"
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if get_origin(hint) in (list, tuple):
        kinds = get_args(hint)
        if get_origin(hint) is list or kinds[-1] is Ellipsis:
            return f"{'lists' if many else 'a list'} of {describe(kinds[0], True)}"
        each = describe(kinds[0], True) if len(set(kinds)) == 1 else ", ".join(map(describe, kinds))
        return f"{'lists' if many else 'a list'} of {len(kinds)} {each}"
    return "values" if many else "a value"


def misfit(hint: Any, value: Any, key: str) -> str | None:
    """Says in one line, which begins with a key, where `value` of a field `key` does not fit its type; None if it does.

    `value` is what YAML gives: a text may stand for a number, as in key=value. Values that refer to others (`${...}`)
    fit, until they are resolved.
    """
    kinds = options(hint)
    if isinstance(value, str) and ("${" in value or value == "???"):
        return unreadable(value, key)
    if isinstance(value, dict):
        owner = next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)
        if owner is not None:
            return _misfit_of_keys(owner, value, key)
    if isinstance(value, list | tuple):
        for kind in kinds:
            if get_origin(kind) in (list, tuple):
                return _misfit_of_items(hint, kind, value, key)
    if Any in kinds or any(_fits(kind, value) for kind in kinds):
        return unreadable(value, key) if isinstance(value, str) else None
    return f"{key} must be {describe(hint)}, got {shown(value)}"


def misfit_at(schema: type, key: str, value: Any) -> str | None:
    """`misfit` of the field at a dotted key; also says if there is no such field."""
    hint: Any = schema
    parts = key.split(".")
    for i, part in enumerate(parts):
        owner = next((kind for kind in options(hint) if dataclasses.is_dataclass(kind)), None)
        if owner is None:
            for rest in reversed(parts[i:]):
                value = {rest: value}
            return misfit(hint, value, ".".join(parts[:i]))
        hints = get_type_hints(owner)
        if part not in hints:
            near = did_you_mean(part, list(hints)) or f"; {parts[i - 1] if i else 'the config'} has {', '.join(hints)}"
            return f"{'.'.join(parts[: i + 1])}: no such key{near}"
        hint = hints[part]
    return misfit(hint, value, key)


def unknown_part(schema: type, key: str) -> str | None:
    """The beginning of a dotted key, up to the part that is no field of `schema`; None where all parts are."""
    hint: Any = schema
    parts = key.split(".")
    for i, part in enumerate(parts):
        owner = next((kind for kind in options(hint) if dataclasses.is_dataclass(kind)), None)
        if owner is None:
            return None
        if part not in (hints := get_type_hints(owner)):
            return ".".join(parts[: i + 1])
        hint = hints[part]
    return None


def _misfit_of_keys(owner: Any, value: dict, key: str) -> str | None:
    hints = get_type_hints(owner)
    for name, item in value.items():
        if name not in hints:
            near = did_you_mean(str(name), list(hints)) or f"; {key} has {', '.join(hints)}"
            return f"{key}.{name}: no such key{near}"
        if wrong := misfit(hints[name], item, f"{key}.{name}"):
            return wrong
    return None


def _misfit_of_items(hint: Any, kind: Any, value: Sequence[Any], key: str) -> str | None:
    kinds = get_args(kind)
    if get_origin(kind) is list or kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(value)
    if len(kinds) != len(value):
        return f"{key} must be {describe(hint)}, got {shown(value)}"
    wrong = next((x for i, (k, item) in enumerate(zip(kinds, value)) if (x := misfit(k, item, f"{key}[{i}]"))), None)
    if wrong is None or any(dataclasses.is_dataclass(kind) for kind in kinds):
        return wrong
    return f"{key} must be {describe(hint)}, got {shown(value)}"  # a short list reads best as a whole


def _fits(kind: Any, value: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind is NoneType:
        return value is None
    if kind is bool:
        return str(value).lower() in TRUE + FALSE if isinstance(value, str | bool | int) else False
    if isinstance(value, bool):
        return kind is str
    if kind is int:
        return isinstance(value, int) or (isinstance(value, str) and _number(int, value) is not None)
    if kind is float:
        number = _number(float, value) if isinstance(value, str | int | float) else None
        return number is not None and math.isfinite(number)
    return kind is str and isinstance(value, str | int | float)


def _number(kind: type, value: Any) -> Any:
    try:
        return kind(value)
    except (ValueError, OverflowError):  # OverflowError: a whole number past the largest float
        return None


def unreadable(text: str, key: str) -> str | None:
    """Names in one line a character that no file name, terminal or tokenizer accepts; None if all are good."""
    if "\0" in text:
        return f"{key} must not hold a NUL character; leave it out"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"{key} must be UTF-8, got the byte or half character {text[error.start]!r}; write it anew"
    return None


def shown(value: Any) -> str:
    """`value` for a message; the end of a long one is left out."""
    try:
        text = str(value).lower().replace("none", "null") if value is None or isinstance(value, bool) else repr(value)
    except ValueError:  # an int of more digits than Python writes
        return "a number of thousands of digits"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def did_you_mean(name: str, names: Sequence[str]) -> str:
    """ "; did you mean x or y?" when some of `names` are close to `name`, else nothing."""
    near = difflib.get_close_matches(name[:LONGEST], names, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else ""
