"""Parts that the commands share: names, parsers that refuse in one line, types of arguments, and lines on stderr."""

import argparse
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from helios_jax.config import ConfigError


def program_name(script: str) -> str:
    """`script`, such as sample.py, or the installed command, such as helios-sample, where that was typed."""
    typed = Path(sys.argv[0]).name
    return typed if typed.startswith("helios-") else script


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ConfigErrors, in one line: the usage of many flags would hide them."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(_refusal(message))


class Tool(argparse.ArgumentParser):
    """An argument parser whose errors are printed in one line and end the process, for a command that catches none."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {_refusal(message)}\n")


def count(text: str) -> int:
    """The type of an argument that is a number from 1 up."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number from 1 up, got {text}")
    return int(text)


def frame_size(text: str) -> tuple[int, int]:
    """Height and width of the argument `--size`. Raises ConfigError."""
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise ConfigError(f"--size is {text!r}: it must read HEIGHTxWIDTH, as in 384x640")
    return int(height), int(width)


class Lines(logging.StreamHandler):
    """A log handler that begins lines with the program's name, and looks up `sys.stderr` for each line: a progress bar
    replaces it while it is shown."""

    def __init__(self, program: str):
        logging.Handler.__init__(self)
        self.setFormatter(logging.Formatter(f"{program}: %(message)s"))

    @property
    def stream(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return sys.stderr


@contextmanager
def warnings_as_lines(program: str) -> Iterator[None]:
    """Prints warnings as lines with the program's name, each once for its place."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        print(f"{program}: warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = show
        yield


def _refusal(message: str) -> str:
    return f"{' '.join(message.split())}; --help lists all flags"
