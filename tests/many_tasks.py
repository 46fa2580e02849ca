"""Tasks of tests/runtime/test_many.py. They import little, so that a worker begins fast."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Item:
    """A task, and what happens to it."""

    name: str
    fate: str
    folder: Path


def start():
    """Numbers what this process makes."""
    made = 0

    def make(item: Item) -> int:
        nonlocal made
        made += 1
        tries = item.folder / f"{item.name}.tries"
        with tries.open("a") as file:
            file.write(".")
        if item.fate == "deadly" or (item.fate == "deadly once" and tries.stat().st_size == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        if item.fate == "wait":
            time.sleep(600)
        if item.fate == "bad":
            raise ValueError(f"{item.name} is bad:\nit cannot be")
        if item.fate == "buggy":
            raise KeyError(item.name)
        (item.folder / item.name).write_text("")
        return made

    return make


def done(item: Item) -> bool:
    return (item.folder / item.name).exists()


def refuse():
    raise FileNotFoundError("no folder x")


def die():
    os.kill(os.getpid(), signal.SIGKILL)
