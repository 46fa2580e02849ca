"""The watch of the hosts of one run: they send heartbeats, and end together.

A host that cannot go on reports it (`Watch.end`), and the others end with its line and exit code, whatever they are
waiting for. Otherwise they would hang in the next collective. A host that was killed reports nothing: the first host
notices the missing heartbeats and tells the others that it is gone, and they end with `GONE_CODE`.

Like `hosts`, it uses the key-value store of jax's coordination service.
"""

import atexit
import contextlib
import json
import os
import subprocess
import threading
import time
from typing import Any, NoReturn

import jax
from jax._src import distributed  # the store has no public name

from helios_jax.runtime import interrupts
from helios_jax.runtime.hosts import FOLDER

BEAT = 1.0  # seconds between two heartbeats
SILENCE = 30.0  # seconds without a heartbeat after which a host counts as gone
# The same after a collective has failed, when only the host that caused it is looked for.
SILENCE_AFTER_FAILURE = 5.0
FAREWELL = 5.0  # seconds that the first host keeps the store open, so that others can read how the run ended
GONE_CODE = 76  # exit code of the hosts that are left, by which a launcher tells a lost host from a run that failed
PARTING = 0.5  # seconds that the store stays open after that
DONE = "done"
FOR_EVER = 2**31  # milliseconds: 24 days
AGAIN = "the same command on all hosts goes on from the newest checkpoint"
GONE = f"is gone; {AGAIN}"


class _LastWord:
    """A shell that prints the last line of this process, or a line of its own if this process dies without giving one.

    The process dies so when it is killed, or when jax ends it because host 0 is gone.
    """

    def __init__(self, program: str):
        self._program = program
        script = 'trap "" INT TERM; if read -r line; then test -z "$line" || echo "$line"; else echo "$0"; fi >&2'
        command = ["sh", "-c", script, f"{program}: this host was killed or has lost host 0; {AGAIN}"]
        self._shell = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        atexit.register(self._give, "")
        interrupts.at_leave(lambda: self._give(""))

    def say(self, line: str) -> None:
        """Prints the line, unless there was one before."""
        self._give(f"{self._program}: {line}")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._shell.wait(1)

    def _give(self, line: str) -> None:
        assert self._shell.stdin is not None
        with contextlib.suppress(OSError):  # the shell has its line, and has ended
            os.write(self._shell.stdin.fileno(), f"{line}\n".encode())


class Watch:
    """Threads that end this process when another host has failed or is gone."""

    def __init__(self, program: str):
        self._client: Any = distributed.global_state.client
        self._host, self._hosts = jax.process_index(), jax.process_count()
        self._over = threading.Event()
        self._ending = threading.Lock()  # held by the thread that ends this process, or its watch
        self._signs: dict[str, tuple[str, float]] = {}  # of each host: its last heartbeat, and when it came
        self._last_word = _LastWord(program)
        for work in (self._listen, self._send_heartbeats):
            threading.Thread(target=work, name="hosts", daemon=True).start()

    def end(self, line: str, code: int) -> NoReturn:
        """Ends all hosts with `line` and exit code `code`, but for those that another host has ended first."""
        self._ending.acquire()  # never released: where another host was first, this process is being ended
        self._end_all(f"host {self._host}: {line}", code)
        self._leave(line, code)

    def find_cause(self) -> None:
        """Waits some seconds, so that this process ends with another host's line if that host caused the error here."""
        with contextlib.suppress(Exception):
            self._set(f"broken/{self._host}", "", allow_overwrite=True)
        time.sleep(SILENCE_AFTER_FAILURE + 5 * BEAT)

    def close(self) -> None:
        """Ends the watch of a run that is done."""
        self._ending.acquire()
        self._over.set()
        with contextlib.suppress(Exception):  # a failure is reported at the same moment
            self._set(f"alive/{self._host}", DONE, allow_overwrite=True)
            self._set(f"end/{self._host}", DONE)

    def _leave(self, line: str, code: int) -> NoReturn:
        """Ends this process; the first host waits until the others have read how the run ended."""
        self._last_word.say(line)
        with contextlib.suppress(Exception):  # the store is gone
            self._set(f"left/{self._host}", "", allow_overwrite=True)
            until = time.monotonic() + FAREWELL
            while self._host == 0 and time.monotonic() < until and len(self._all("left")) < self._hosts:
                time.sleep(0.05)
            if self._host == 0:  # others say it a moment before they leave, and jax aborts those that lose the store
                time.sleep(PARTING)
        interrupts.leave(code)

    def _set(self, name: str, value: str, **options: Any) -> None:
        self._client.key_value_set(f"{FOLDER}/watch/{name}", value, **options)

    def _all(self, name: str) -> list[tuple[str, str]]:
        return self._client.key_value_dir_get(f"{FOLDER}/watch/{name}/")

    def _end_all(self, line: str, code: int) -> None:
        for host in range(self._hosts):
            with contextlib.suppress(Exception):  # it has been told already, or the store is gone
                self._set(f"end/{host}", json.dumps({"line": line, "code": code}))

    def _listen(self) -> None:
        try:
            told = self._client.blocking_key_value_get(f"{FOLDER}/watch/end/{self._host}", FOR_EVER)
        except Exception:  # the store is gone, and the first host with it
            told = json.dumps({"line": f"host 0 {GONE}", "code": GONE_CODE})
        if self._ending.acquire(blocking=False):
            end = json.loads(told)
            self._leave(end["line"], end["code"])

    def _send_heartbeats(self) -> None:
        beats = 0
        while not self._over.wait(BEAT):
            beats += 1
            with contextlib.suppress(Exception):  # `_listen` has the same error
                self._set(f"alive/{self._host}", str(beats), allow_overwrite=True)
                if self._host == 0:
                    self._check_heartbeats()

    def _check_heartbeats(self) -> None:
        """Ends the run if the heartbeats of a host have stopped."""
        now = time.monotonic()
        limit = SILENCE_AFTER_FAILURE if self._all("broken") else SILENCE
        for key, sign in self._all("alive"):
            if self._signs.get(key, ("", 0.0))[0] != sign:
                self._signs[key] = sign, now
            elif sign != DONE and now - self._signs[key][1] > limit:
                self._end_all(f"host {key.rpartition('/')[2]} {GONE}", GONE_CODE)
