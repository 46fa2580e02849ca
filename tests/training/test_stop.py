"""How soon a signal ends a run: the steps that a device makes after it, with a device that works asynchronously."""

import os
import queue
import signal
import threading
import time
import types

import numpy as np
import pytest

from helios_jax.sharding import MeshConfig, make_mesh
from helios_jax.training import loop
from helios_jax.training.run_config import CheckpointConfig, DataConfig, TrainConfig
from tests.training.dummy import Dummy

STEP = 0.2  # seconds


class Device(threading.Thread):
    """Makes steps in their order, each in STEP seconds, while the host goes on; SIGTERM comes while step 4 runs."""

    def __init__(self):
        super().__init__(daemon=True)
        self.begun = 0
        self._steps: queue.Queue[threading.Event] = queue.Queue()
        self.start()

    def run(self) -> None:
        while True:
            done = self._steps.get()
            self.begun += 1
            time.sleep(STEP / 2)
            if self.begun == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(STEP / 2)
            done.set()

    def step(self, state, batch, key):
        done = threading.Event()
        self._steps.put(done)
        return types.SimpleNamespace(step=state.step + 1), {"loss": Later(done), "grad_norm": Later(done)}


class Later:
    """An array of the device, 1.0."""

    def __init__(self, done: threading.Event):
        self._done = done

    def is_ready(self) -> bool:
        return self._done.is_set()

    def block_until_ready(self) -> "Later":
        self._done.wait()
        return self

    def __array__(self, *args, **kwargs) -> np.ndarray:
        self._done.wait()
        return np.array(1.0, np.float32)


class Saved:
    """In the place of checkpoints: the steps and the positions in the data."""

    def __init__(self):
        self.steps: list[tuple[int, dict]] = []

    def save(self, state, position, *rest) -> None:
        self.steps.append((state.step, position))

    def wait(self) -> None:
        pass


@pytest.mark.parametrize(("long", "last"), [(STEP / 2, 4), (10 * STEP, 5)], ids=["long steps", "short steps"])
def test_only_the_step_that_runs_is_finished_after_a_signal(tmp_path, monkeypatch, long, last):
    """Of short steps the next one is queued behind the one that runs, so that the device never waits for the host."""
    config = TrainConfig(run=str(tmp_path), steps=50, data=DataConfig(batch_size=8), checkpoint=CheckpointConfig())
    stage, mesh, device, saved = Dummy(config), make_mesh(MeshConfig()), Device(), Saved()
    monkeypatch.setattr(loop, "LONG", long)
    meter = types.SimpleNamespace(add=lambda *_: None, take=lambda _: {})
    monkeypatch.setattr(loop, "Meter", lambda *_: meter)
    batches, begin = stage.batches(mesh), types.SimpleNamespace(step=0)
    state, stopped = loop.run(device.step, begin, batches, saved, stage, mesh, time.time())
    assert (stopped, state.step) == (signal.SIGTERM, last)
    assert device.begun == last
    assert saved.steps == [(last, {"next_index": last})]
