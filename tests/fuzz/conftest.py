"""A tiny pipeline and a folder of its own for every input."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helios_jax.media.mp4 import VideoWriter
from tests import tiny
from tests.fuzz.attempt import FAILURES


@pytest.fixture(scope="session")
def assets(tmp_path_factory):
    """A folder with a pipeline, inputs that are right, a LoRA and a state."""
    folder = tmp_path_factory.mktemp("assets")
    tiny.folder(folder / "model")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (32, 48, 3), np.uint8)).save(folder / "i.png")
    with VideoWriter(folder / "v.mp4", 8, 32, 48) as writer:
        writer.write(rng.integers(0, 255, (20, 32, 48, 3), np.uint8))
    return folder


class Rooms:
    """New empty folders, each the working directory in turn, in a place that nothing else uses."""

    def __init__(self, root: Path):
        self._root, self._count = root, 0

    def new(self) -> Path:
        self._count += 1
        room = self._root / str(self._count)
        room.mkdir(parents=True)
        os.chdir(room)
        return room


@pytest.fixture(autouse=True)
def no_failures():
    """Fails a test at its end if an input was not answered rightly."""
    FAILURES.clear()
    yield
    if FAILURES:
        pytest.fail(f"{len(FAILURES)} inputs were not answered rightly\n" + "\n".join(FAILURES[:20]), pytrace=False)


@pytest.fixture
def rooms(tmp_path):
    before = Path.cwd()
    yield Rooms(tmp_path)
    os.chdir(before)
