"""Coordination of the hosts of one run: they join, compare their inputs, send heartbeats, and end together.

A host that cannot go on reports it (`Watch.end`), and the others end with its line and exit code, whatever they are
waiting for. Otherwise they would hang in the next collective. A host that was killed reports nothing: the first host
notices the missing heartbeats and tells the others that it is gone.

All of this goes through the key-value store of jax's coordination service, which the first host keeps.
"""

import atexit
import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from typing import Any, NoReturn

import jax
from jax._src import clusters, distributed  # the clusters and the store have no public names
from jax.experimental import multihost_utils

from helios_jax.locations import appears, location
from helios_jax.runtime import interrupts

BEAT = 1.0  # seconds between two heartbeats
SILENCE = 30.0  # seconds without a heartbeat after which a host counts as gone
# The same after a collective has failed, when only the host that caused it is looked for.
SILENCE_AFTER_FAILURE = 5.0
WAIT = 3600.0  # seconds that a host waits for another; if that one is gone, the watch ends it before
FAREWELL = 5.0  # seconds that the first host keeps the store open, so that others can read how the run ended
FOLDER = "helios_jax"  # prefix of the keys
DONE = "done"
FOR_EVER = 2**31  # milliseconds: 24 days
AGAIN = "the same command on all hosts goes on from the newest checkpoint"
GONE = f"is gone; {AGAIN}"


class JoinError(ValueError):
    """Hosts that cannot be found; the message is one line."""


def join(processes: int | None) -> None:
    """Connects this process to the others of a run of `processes`; to be called before anything asks for devices.

    TPU pods and Slurm say where the others are, and how many if `processes` is None (1 where there is neither).
    Elsewhere JAX_COORDINATOR_ADDRESS (host:port of the first process) and JAX_PROCESS_ID (0 and up) say where. Raises
    JoinError when they cannot be found.
    """
    if jax.distributed.is_initialized():
        return
    number = os.environ.get("JAX_PROCESS_ID")
    if processes is None:
        processes = _processes_of_cluster()
        if processes == 1 and number is not None:
            raise JoinError("JAX_PROCESS_ID is set, but no cluster says how many hosts there are: set mesh.processes")
    if processes == 1:
        return
    try:
        jax.distributed.initialize(num_processes=processes, process_id=None if number is None else int(number))
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise JoinError(f"cannot join {processes} hosts: {reason}") from None


def _processes_of_cluster() -> int:
    """The number of processes of the TPU pod or the Slurm step that this process belongs to; 1 if there is none."""
    for cluster in clusters.ClusterEnv._cluster_types:
        if not cluster.opt_in_only_method and cluster.is_env_present():
            return cluster.get_process_count()
    return 1


def several() -> bool:
    """True in a run of several hosts that has begun."""
    return distributed.global_state.client is not None


def gather(name: str, text: str) -> list[str]:
    """The text of every host, in their order; all hosts must call it, once for each `name`."""
    if not several():
        return [text]
    client: Any = distributed.global_state.client
    client.key_value_set(f"{FOLDER}/{name}/{jax.process_index():06d}", text)
    client.wait_at_barrier(f"{FOLDER}/{name}", timeout_in_ms=int(WAIT * 1000))
    return [value for _, value in sorted(client.key_value_dir_get(f"{FOLDER}/{name}/"))]


def of_first(name: str, text: str) -> str:
    """The first host's text; all hosts must call it, once for each `name`."""
    if not several():
        return text
    client: Any = distributed.global_state.client
    if jax.process_index() == 0:
        client.key_value_set(f"{FOLDER}/{name}", text)
    return client.blocking_key_value_get(f"{FOLDER}/{name}", int(WAIT * 1000))


def check_shared(folder: str, key: str) -> None:
    """Raises ValueError unless all hosts see a file that the first one makes in `folder`, the config's `key`."""
    if not several():
        return
    name = of_first(f"shared/{key}/name", f".host.{os.getpid()}.{time.time_ns()}")
    path = location(folder) / name
    first = jax.process_index() == 0
    absent = not path.parent.exists()
    if first:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    of_first(f"shared/{key}/made", "")
    seen = appears(path, name)
    blind = [str(host) for host, text in enumerate(gather(f"shared/{key}/seen", str(seen))) if text != "True"]
    if first:
        path.unlink()
        if absent:
            with contextlib.suppress(OSError):
                path.parent.rmdir()
    if blind:
        raise ValueError(
            f"{key}: {folder} is another folder on host {', '.join(blind)} than on host 0; name one on a file system "
            "that all hosts mount, such as an NFS share"
        )


def agreed_signal(step: int, seen: signal.Signals | None) -> signal.Signals | None:
    """The signal that ends the run after `step` on all hosts, if any of them got one; `seen` is this host's signal.

    All hosts must call it after every step. A host that got SIGTERM tells the others through jax's preemption service,
    which catches it; they agree on a step that none of them has passed.
    """
    if not multihost_utils.reached_preemption_sync_point(step):
        return None
    numbers = [int(text) for text in gather(f"signal/{step}", str(int(seen or signal.SIGTERM)))]
    return signal.SIGINT if signal.SIGINT in numbers else signal.SIGTERM


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
            told = json.dumps({"line": f"host 0 {GONE}", "code": 1})
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
                self._end_all(f"host {key.rpartition('/')[2]} {GONE}", 1)
