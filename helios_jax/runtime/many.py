"""Independent tasks, in this process or on the machines of a Ray cluster: videos, shards of a dataset, whole runs.

    for result in many.run(tasks, start, cluster=many.cluster(address, worker)):
        ...

`start()` prepares a process, in which it loads a model, say, and returns the function that makes a task. In this
process the tasks are made one after another. On a cluster each worker is a process with its own accelerators. It calls
`start` once and makes one task after another, until none is left. There are as many workers as the cluster has room
for, also when machines join or leave it.

The error of a task is its result, and the others go on. A task whose worker dies is given to another. Tasks write their
outputs to a file system that all machines share, or to a bucket; from these `done` tells whether a task is done.
"""

import importlib.util
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from helios_jax.locations import is_remote, location, wait_for_text
from helios_jax.messages import one_line
from helios_jax.runtime import interrupts
from helios_jax.runtime.memory import is_out_of_memory

RETRIES = 2  # of a task whose worker died; and of workers in a row that die before they are ready
ACCELERATORS = ("GPU", "TPU", "CPU")  # a worker has one of the first kind that the cluster has, unless told otherwise
POLL = 0.2  # seconds between two looks at signals
CONNECT = 10.0  # seconds that a cluster has to answer
PATIENCE = 60.0  # seconds without a worker at work after which a line says so
RECOUNT = 5.0  # seconds between two counts of the cluster's machines
EXPECTED = (ValueError, OSError, ArithmeticError)  # their text says all; others are shown with their traceback


@runtime_checkable
class Task(Protocol):
    """Anything that pickle takes, with a name for messages."""

    @property
    def name(self) -> str: ...


T = TypeVar("T", bound=Task)
R = TypeVar("R")
Start = Callable[[], Callable[[T], R]]


class ClusterError(ValueError):
    """A cluster that cannot do the work; the message is one line."""


@dataclass(frozen=True)
class Result(Generic[T, R]):
    """The value of a task, or its error in one line, with the traceback if it was not expected."""

    task: T
    value: R | None = None
    error: str | None = None
    trace: str = ""


@dataclass(frozen=True)
class Cluster:
    """The address of a Ray cluster, and what each worker needs of it; None: one accelerator."""

    address: str
    worker: Mapping[str, int] | None


def cluster(address: str | None, worker: str | None) -> Cluster | None:
    """The cluster of the options --ray and --ray-worker; None without them. Raises ClusterError for unusable ones.

    With a cluster, jax uses only the CPU in this process and leaves its accelerators to workers.
    """
    if address is None:
        if worker is not None:
            raise ClusterError("--ray-worker is for workers of a Ray cluster: give --ray, too, or leave it out")
        return None
    need = {}
    for part in worker.split(",") if worker is not None else ():
        name, _, number = part.strip().partition("=")
        if not (name and number.isdecimal() and int(number)):
            raise ClusterError(f"--ray-worker is {worker!r}: it must read NAME=NUMBER, as in GPU=1, TPU=4 or CPU=8")
        need[name] = int(number)
    if importlib.util.find_spec("ray") is None:
        raise ClusterError('--ray: the package is not installed; pip install "helios_jax[ray]", or leave --ray out')
    importlib.import_module("jax").config.update("jax_platforms", "cpu")
    return Cluster(address, need or None)


def run(
    tasks: Sequence[T],
    start: Start[T, R],
    *,
    done: Callable[[T], bool] = lambda task: False,
    cluster: Cluster | None = None,
    shared: Sequence[Path] = (),
) -> Iterator[Result[T, R]]:
    """The results of all tasks that are not `done`, as they come; each error is printed.

    Args:
        start: prepares a process; its error ends the run. For a cluster, it and the tasks are pickled, and their
            modules must be importable there.
        done: tells by a task's outputs that nothing is left to do.
        shared: folders that tasks write to; all machines must see the same.

    Raises:
        ClusterError: the cluster is not there, has no room, or its machines cannot do the work.
    """
    todo = [task for task in tasks if not done(task)]
    for result in _here(todo, start) if cluster is None else _there(todo, start, done, cluster, shared):
        if result.error is not None:
            print(f"{result.trace}failed: {result.task.name}: {result.error}", file=sys.stderr, flush=True)
        yield result


def _here(tasks: Sequence[T], start: Start[T, R]) -> Iterator[Result[T, R]]:
    make = start() if tasks else None
    for task in tasks:
        yield _result(make, task)


def _there(tasks: Sequence[T], start: Any, done: Any, cluster: Cluster, shared: Any) -> Iterator[Any]:
    if not tasks:
        return
    with _connected(cluster.address) as ray, _probes(shared) as probes, interrupts.deferred():
        yield from _Pool(ray, cluster.worker, tasks, done).results(ray.put(start), probes)


def _result(make: Any, task: Any) -> Result[Any, Any]:
    try:
        return Result(task, make(task))
    except EXPECTED as error:
        return Result(task, error=one_line(error, most=None))
    except Exception as error:
        trace = "" if is_out_of_memory(error) else traceback.format_exc()
        return Result(task, error=one_line(f"{type(error).__name__}: {error}"), trace=trace)


class _Worker:
    """A process of the cluster: a Ray actor."""

    def begin(self, start: Start[Any, Any], folder: str, probes: Mapping[str, str]) -> tuple[str, str | None]:
        """Prepares the process; returns the machine's name, and in one line why it cannot do the work, if so."""
        node = os.uname().nodename
        with suppress(OSError):  # relative paths are the driver's or, without its folder, a working_dir's
            os.chdir(folder)
        for name, text in probes.items():
            if not wait_for_text(path := location(name), text):
                return node, (
                    f"{path.parent} is another folder on {node} than where the run was started: name one on a file"
                    " system that all machines mount, such as an NFS share, or one in a bucket"
                )
        try:
            self._make = start()
        except EXPECTED as error:
            return node, f"{one_line(error, most=None)} (on {node})"
        return node, None

    def make(self, task: Any) -> Result[Any, Any]:
        return _result(self._make, task)


@dataclass(frozen=True)
class _Call:
    """A call that a worker runs: it makes the task of this number or, without one, begins."""

    worker: Any
    node: str
    task: int | None


class _Pool:
    """Workers on a cluster, each with one call at a time, and the tasks that wait for them."""

    def __init__(self, ray: Any, need: Mapping[str, int] | None, tasks: Sequence[Any], done: Any):
        self._ray, self._tasks, self._done = ray, tasks, done
        self._waiting, self._calls = deque(range(len(tasks))), dict[Any, _Call]()
        self._deaths, self._unready = Counter[int](), 0  # of workers: by task, and in a row before they were ready
        self._finished, self._began = 0, time.monotonic()
        kind = next((kind for kind in ACCELERATORS if any(kind in machine for machine in self._machines())), "CPU")
        self._need = need or {kind: 1}
        told = ",".join(f"{name}={number}" for name, number in self._need.items())
        if not self._count():
            has = "; ".join(",".join(f"{k}={m[k]:g}" for k in sorted(m) if ":" not in k) for m in self._machines())
            raise ClusterError(f"--ray-worker is {told}: no machine of the cluster has as much; they have {has}")
        print(f"{len(tasks)} tasks, room for {self._room} workers with {told} each", flush=True)
        other = {name: number for name, number in self._need.items() if name not in ("CPU", "GPU")}
        amounts = {"num_cpus": self._need.get("CPU", 0), "num_gpus": self._need.get("GPU", 0), "resources": other}
        self._actor = ray.remote(**amounts)(_Worker)

    def results(self, start: Any, probes: Mapping[str, str]) -> Iterator[Result[Any, Any]]:
        """The results of all tasks, as they come."""
        errors, silent_until = self._ray.exceptions, time.monotonic() + PATIENCE
        while self._waiting or self._busy():
            if self._busy():
                silent_until = time.monotonic() + PATIENCE
            elif time.monotonic() > silent_until:
                silent_until += PATIENCE
                print("no worker is ready: they load, or wait for machines that are busy or gone", flush=True)
            if time.monotonic() > self._counted + RECOUNT:
                self._count()
            for _ in range(min(self._room, self._busy() + len(self._waiting)) - len(self._calls)):
                worker = self._actor.remote()
                self._calls[worker.begin.remote(start, os.getcwd(), probes)] = _Call(worker, "", None)
            ended = self._ray.wait(list(self._calls), timeout=POLL)[0] if self._calls else time.sleep(POLL)
            interrupts.check()
            for reference in ended or ():
                call = self._calls.pop(reference)
                try:
                    answer = self._ray.get(reference)
                except errors.RayTaskError as error:  # raised by `start`: the error of a task is a result
                    raise (error.cause or error) from error
                except errors.RayError as error:
                    answer = self._lost(call, _reason(error))
                else:
                    self._go_on(call, answer)
                if call.task is not None and answer is not None:
                    self._tell(call)
                    yield answer

    def _go_on(self, call: _Call, answer: Any) -> None:
        """Gives the next task to the call's worker, which is free."""
        node, refusal = (call.node, None) if call.task is not None else answer
        if refusal is not None:
            raise ClusterError(refusal)
        self._unready = 0
        if self._waiting:
            number = self._waiting.popleft()
            self._calls[call.worker.make.remote(self._tasks[number])] = _Call(call.worker, node, number)
        else:
            self._ray.kill(call.worker)  # others can have its accelerators

    def _lost(self, call: _Call, reason: str) -> Result[Any, Any] | None:
        """The result of a call whose worker died; None if there is another try."""
        self._ray.kill(call.worker)  # it may live on a machine that is out of reach
        if call.task is None:
            self._unready += 1
            if self._unready > RETRIES:
                raise ClusterError(f"--ray: {self._unready} workers in a row died before they were ready: {reason}")
            return None
        task = self._tasks[call.task]
        self._deaths[call.task] += 1
        if self._done(task):
            return Result(task)
        if self._deaths[call.task] > RETRIES:
            return Result(task, error=f"its worker died {self._deaths[call.task]} times: {reason}")
        print(f"again: {task.name}: its worker on {call.node} died: {reason}", file=sys.stderr, flush=True)
        self._waiting.append(call.task)
        return None

    def _tell(self, call: _Call) -> None:
        """Prints how far the work is."""
        self._finished += 1
        seconds = (time.monotonic() - self._began) / self._finished * (len(self._tasks) - self._finished)
        name, left = self._tasks[call.task or 0].name, timedelta(seconds=round(seconds))
        print(f"{self._finished}/{len(self._tasks)} {name} on {call.node}, about {left} left", flush=True)

    def _busy(self) -> int:
        return sum(call.task is not None for call in self._calls.values())

    def _machines(self) -> list[dict[str, float]]:
        return [machine["Resources"] for machine in self._ray.nodes() if machine["Alive"]]

    def _count(self) -> int:
        """The number of workers that the cluster has room for if nobody else uses it."""
        self._counted = time.monotonic()
        rooms = [min(m.get(name, 0) // number for name, number in self._need.items()) for m in self._machines()]
        self._room = int(sum(rooms))
        return self._room


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """Connects Ray to a cluster, and disconnects it at the end, which also ends the workers, whatever they do."""
    ray: Any = importlib.import_module("ray")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # for a cluster that starts here
    ours = signal.getsignal(signal.SIGTERM)
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if port.isdecimal():  # Ray itself tries for minutes
            socket.create_connection((host, int(port)), CONNECT).close()
        with warnings.catch_warnings(action="ignore"):  # jax warns of the fork that starts a process of Ray
            # The workers' lines are in Ray's logs.
            ray.init(address, log_to_driver=False, logging_level=logging.CRITICAL)
    except Exception as error:  # of many kinds
        raise ClusterError(f"--ray {address}: there is no cluster that can be used: {one_line(error)}") from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, ours)  # Ray sets a handler that raises SystemExit
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def _probes(folders: Sequence[Path]) -> Iterator[dict[str, str]]:
    """A file in each folder, with its text, by which a worker sees that the folder is the same there."""
    text = f"{os.uname().nodename}.{os.getpid()}.{time.time_ns()}"
    with ExitStack() as files:
        paths = [folder / f".probe.{text}" for folder in folders]
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not is_remote(path):
                files.enter_context(interrupts.temporary(path))
            files.callback(path.unlink, missing_ok=True)
            path.write_text(text)
        yield {str(path): text for path in paths}  # as text: a location sets its process up for buckets


def _reason(error: Exception) -> str:
    """Picks the cause of a worker's death from the many lines of Ray's error."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    line = next((line for line in lines if "Worker exit detail: " in line), lines[-1])
    return one_line(line.rpartition("Worker exit detail: ")[2].partition(" Some common causes")[0])
