"""Jobs that may hang or break a device, in a worker process that is replaced if one does."""

import argparse
import contextlib
import json
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

START = 180.0  # seconds for a worker to import jax and find its device
Answer = dict[str, Any]


class Here:
    """Jobs that run in this process: easy to debug, but a job that hangs is not ended."""

    def __init__(self, greeting: Answer, job: Callable[[int], Answer]):
        self.greeting, self._job = greeting, job

    def ask(self, number: int, limit: float) -> Answer:
        return self._job(number)

    def close(self) -> None:
        """Does nothing: there is no worker."""


class Apart:
    """Jobs that run in a worker process, `command`, which calls `serve`.

    `greeting` is the worker's first message. Raises RuntimeError if no worker can be started.
    """

    def __init__(self, command: Sequence[str]):
        self._command, self._worker = command, _Worker(command)
        self.greeting = self._worker.greeting

    def ask(self, number: int, limit: float) -> Answer:
        """The answer of job `number`: `{"why": ...}` if its process dies or is killed after `limit` seconds.

        The next job then gets a new process. So does the job after one that broke the device.
        """
        if self._worker.ended:
            self._worker.close()
            self._worker = _Worker(self._command)
        return self._worker.ask(number, limit)

    def close(self) -> None:
        """Ends the worker."""
        self._worker.close()


class _Worker:
    def __init__(self, command: Sequence[str]):
        self.ended = False
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.greeting = self._answer(START)
        if self.ended:
            self.close()
            raise RuntimeError(f"no worker process could be started: {self.greeting['why']}")

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def ask(self, number: int, limit: float) -> Answer:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the worker died: its output has ended
            print(number, file=self._process.stdin, flush=True)
        return self._answer(limit)

    def _answer(self, limit: float) -> Answer:
        try:
            line = self._lines.get(timeout=limit)
        except queue.Empty:
            self.ended = True
            return {"why": f"no answer in {limit:.0f} s"}
        if line is None:
            self.ended = True
            code = self._process.wait()
            return {"why": f"its process ended with {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"}
        answer = json.loads(line)
        self.ended = answer.pop("spoiled", False)
        return answer

    def close(self) -> None:
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may never release a process
            self._process.wait(10)


def limit(text: str) -> float:
    """The value of `--limit`, seconds. Raises ArgumentTypeError below 0."""
    seconds = float(text)
    if not seconds >= 0:
        raise argparse.ArgumentTypeError(f"must be at least 0 seconds, got {text}")
    return seconds


def serve(greeting: Answer, job: Callable[[int], Answer]) -> None:
    """The worker's side: prints `greeting`, then answers each number on stdin by `job`, one JSON line on stdout.

    All other output goes to stderr. After a job that failed it tests the device: an illegal access, for example,
    breaks the device for all later jobs of the process.
    """
    out, sys.stdout = sys.stdout, sys.stderr
    print(json.dumps(greeting), file=out, flush=True)
    for line in sys.stdin:
        answer = job(int(line))
        print(json.dumps(answer | {"spoiled": bool(answer.get("why")) and not _works()}), file=out, flush=True)


def _works() -> bool:
    try:
        return float(jnp.ones(8).sum()) == 8
    except jax.errors.JaxRuntimeError:
        return False
