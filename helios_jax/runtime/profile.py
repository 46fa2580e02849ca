"""Profiles of training steps or of chunks, for TensorBoard's profile page, xprof and Perfetto."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax

from helios_jax.locations import copy_tree, is_remote


class Profile:
    """Records `count` steps of this process into `folder`, on every host; nothing with 0, or without a folder.

    The first `skipped` are left out, because they compile and fill caches. `unit` is the name of a step in messages.
    """

    def __init__(self, folder: Path | None, count: int, *, skipped: int, unit: str = "step"):
        self._folder, self._left, self._skipped, self._unit = folder or Path(), count if folder else 0, skipped, unit
        self._seen, self._recording, self._local = 0, False, self._folder

    def after_step(self, results: Any) -> None:
        """Counts a step, and starts or ends the recording; `results` are arrays of the step, which it waits for."""
        self._seen += 1
        if self._recording:
            self._left -= 1
            if self._left == 0:
                jax.block_until_ready(results)
                self.close()
        elif self._left and self._seen == self._skipped:
            jax.block_until_ready(results)
            # The profiler writes local files only.
            self._local = Path(tempfile.mkdtemp()) if is_remote(self._folder) else self._folder
            jax.profiler.start_trace(str(self._local))
            self._recording = True

    def close(self) -> None:
        """Writes the recorded steps, also if the run ends before all are, and prints where; says if there are none."""
        if self._recording:
            jax.profiler.stop_trace()
            if self._local is not self._folder:
                copy_tree(self._local, self._folder)
                shutil.rmtree(self._local)
            self._recording, self._left = False, 0
            self._say(f"profile of {self._unit}s in {self._folder}: tensorboard --logdir {self._folder}")
        elif self._left:
            left_out = f"the first {self._skipped} are left out" if self._skipped > 1 else "the first is left out"
            self._say(f"no {self._unit} was recorded: this process made {self._seen}, and {left_out}")

    def _say(self, line: str) -> None:
        if jax.process_index() == 0:
            print(line, flush=True)
