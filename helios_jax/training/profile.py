"""Profiles of training steps, for TensorBoard's profile page, xprof and Perfetto."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax

from helios_jax.locations import copy_tree, is_remote

SKIPPED = 2  # steps of a process before the recorded ones: the first compiles, the second still fills caches


class Profile:
    """Records `steps` steps of this process into `folder`, on every host; 0 records nothing."""

    def __init__(self, folder: Path, steps: int):
        self._folder, self._left, self._seen, self._recording = folder, steps, 0, False
        self._local = folder

    def after_step(self, results: Any) -> None:
        """Counts a step, and starts or ends the recording; `results` are arrays of the step, which it waits for."""
        self._seen += 1
        if self._recording:
            self._left -= 1
            if self._left == 0:
                jax.block_until_ready(results)
                self.close()
        elif self._left and self._seen == SKIPPED:
            jax.block_until_ready(results)
            # The profiler writes local files only.
            self._local = Path(tempfile.mkdtemp()) if is_remote(self._folder) else self._folder
            jax.profiler.start_trace(str(self._local))
            self._recording = True

    def close(self) -> None:
        """Writes the recorded steps, also where the run ends before all are; prints a line if no step was recorded."""
        if self._recording:
            jax.profiler.stop_trace()
            if self._local is not self._folder:
                copy_tree(self._local, self._folder)
                shutil.rmtree(self._local)
            self._recording, self._left = False, 0
            self._say(f"profile of steps in {self._folder}: tensorboard --logdir {self._folder}")
        elif self._left:
            self._say(f"no step was recorded: this process made {self._seen}, and the first {SKIPPED} are left out")

    def _say(self, line: str) -> None:
        if jax.process_index() == 0:
            print(line, flush=True)
