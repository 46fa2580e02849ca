"""Parts that the commands share: the name under which one was started, and parsers that refuse in one line."""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

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


def _refusal(message: str) -> str:
    return f"{' '.join(message.split())}; --help lists all flags"
