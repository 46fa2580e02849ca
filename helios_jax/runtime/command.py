"""The name under which a command was started, for its messages."""

import sys
from pathlib import Path


def program_name(script: str) -> str:
    """`script`, such as sample.py, or the installed command, such as helios-sample, where that was typed."""
    typed = Path(sys.argv[0]).name
    return typed if typed.startswith("helios-") else script
