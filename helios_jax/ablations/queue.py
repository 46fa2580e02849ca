"""The queue of a table's jobs: several at a time, each once, through kills and restarts.

A job that ends with exit code 0 leaves `done.json` in its folder; one without runs again with the same command, and
`train.py` goes on from its checkpoint. What it prints is in its `log.txt`. A job holds a lock as long as it lives, and
its queue until `done.json` is written, so that two queues with the same folder run it once. A queue that was killed and
started again waits for the jobs that go on by themselves. It then runs these again, because nobody saw how they ended.
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

from helios_jax.ablations.table import Job
from helios_jax.config import ConfigError
from helios_jax.locations import replacing
from helios_jax.runtime import interrupts, many
from helios_jax.runtime.many import Cluster

DONE, LOG, LOCK = "done.json", "log.txt", "lock"
POLL = 0.2  # seconds between two looks at jobs and signals
PATIENCE = 60.0  # seconds that jobs have to save what they made when the queue is stopped
LAST = 2000  # characters at the end of a log in which the reason of a failure is looked for


def done(job: Job) -> bool:
    """True if the job has ended well."""
    return (job.folder / DONE).is_file()


def to_do(jobs: Sequence[Job], wanted: Collection[Job]) -> list[Job]:
    """The `jobs` that must run to get the results of the `wanted` ones, in the same order.

    A job that only finished jobs needed does not run again, so its folder may have been deleted.
    """
    found = dict[Job, None]()
    for job in reversed(jobs):  # each comes after the jobs that it needs
        if not done(job) and (job in wanted or any(job in other.needs for other in found)):
            found[job] = None
    return list(reversed(found))


@dataclass(frozen=True)
class Slot:
    """A share of this machine: the processors and the GPUs (None: no GPU is hidden) that a job may use."""

    processors: frozenset[int]
    gpus: str | None = None


def slots(count: int) -> list[Slot]:
    """This machine in `count` equal shares. Raises ValueError if there are fewer processors or GPUs."""
    processors, gpus = sorted(os.sched_getaffinity(0)), _gpus()
    for name, there in {"processors": processors, "GPUs": gpus}.items():
        if there and len(there) < count:
            raise ValueError(f"--parallel is {count}: this machine has {len(there)} {name}, so give at most as many")

    def share(things: Sequence[Any], number: int) -> Sequence[Any]:
        size = len(things) // count
        return things[number * size : (number + 1) * size]

    return [
        Slot(frozenset(share(processors, i)), ",".join(share(gpus, i)) if gpus and count > 1 else None)
        for i in range(count)
    ]


def _gpus() -> list[str]:
    """Numbers of the GPUs that this process may use."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [number for number in visible.split(",") if number]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return [str(i) for i in range(len(listed.splitlines()))]


@dataclass(frozen=True, eq=False)
class Running:
    """A job that runs, in a process that leads a group of its own; `lock` is the open file of the job's lock."""

    job: Job
    process: subprocess.Popen[bytes]
    lock: IO[str]
    since: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self.since

    def end(self) -> str | None:
        """Marks the job, whose process has ended, as done, or says in one line why it is not; lets go of the lock."""
        with self.lock:
            if self.process.returncode:
                return _failure(self.job, self.process.returncode)
            facts = {"name": self.job.name, "command": list(self.job.command), "seconds": round(self.seconds, 1)}
            try:
                with replacing(self.job.folder / DONE) as part:
                    part.write_text(json.dumps(facts, indent=2) + "\n")
            except OSError as error:
                return str(error)
            return None


def program(job: Job) -> str:
    """The program of a job's command; `python` is the one that runs this."""
    return sys.executable if job.command[0] == "python" else job.command[0]


def check_programs(jobs: Sequence[Job]) -> None:
    """Raises ConfigError for a job whose program this machine cannot find or may not run."""
    for job in jobs:
        if shutil.which(program(job)) is None:
            raise ConfigError(
                f"{job.name}: {job.command[0]} is no program that can be run here: install it, or correct its name"
            )


def run(jobs: Sequence[Job], wanted: Collection[Job], parallel: int = 1) -> dict[Job, str]:
    """Runs the `wanted` jobs and those they need, unless done; `parallel` at a time, each on a share of the machine.

    `jobs` are in an order in which each comes after those that it needs. Returns the reasons of those that failed or
    could not begin; the others are done. A signal ends the jobs, which save what they made, and raises `Interrupted`.
    Raises ConfigError for a program that this machine has not, before any job runs.
    """
    waiting, failed = to_do(jobs, wanted), dict[Job, str]()
    check_programs(waiting)
    free, running = slots(parallel), dict[Running, Slot]()
    total, told, begin = len(waiting), set[Path](), time.monotonic()
    print(f"{len(jobs)} jobs, {total} of them to do", flush=True)

    def tell(job: Job, seconds: float) -> None:
        left = len(waiting) + len(running)
        ahead = (time.monotonic() - begin) / max(total - left, 1) * left
        state = f"failed: {failed[job]}" if job in failed else f"{seconds:.0f} s"
        line = f"{total - left}/{total} {job.name}: {state}; about {timedelta(seconds=round(ahead))} left"
        print(line, file=sys.stderr if job in failed else sys.stdout, flush=True)

    with interrupts.deferred():
        try:
            while waiting or running:
                for job in list(waiting):
                    if broken := [need for need in job.needs if need in failed]:
                        failed[job] = f"it needs {broken[0].name}, which failed"
                        waiting.remove(job)
                    elif free and all(map(done, job.needs)):
                        try:
                            started = _start(job, free[-1], told)
                        except OSError as error:
                            failed[job] = str(error)
                            waiting.remove(job)
                            tell(job, 0)
                            continue
                        if started is not None:
                            running[started] = free.pop()
                        if started is not None or done(job):  # else another process makes it
                            waiting.remove(job)
                interrupts.check()
                time.sleep(POLL)
                for one in [one for one in running if one.process.poll() is not None]:
                    free.append(running.pop(one))
                    if reason := one.end():
                        failed[one.job] = reason
                    tell(one.job, one.seconds)
        finally:
            _stop(running)
    return failed


def make(job: Job) -> float:
    """Runs one job to its end, on a worker of a cluster; returns the seconds. Raises OSError if it fails."""
    while (one := _start(job, None, set())) is None:
        if done(job):
            return 0.0
        time.sleep(POLL)
    try:
        one.process.wait()
    except BaseException:
        _stop([one])
        raise
    if reason := one.end():
        raise OSError(reason)
    return one.seconds


def run_on(cluster: Cluster, jobs: Sequence[Job], wanted: Collection[Job], out: Path) -> dict[Job, str]:
    """Runs jobs on a cluster in rounds, each with all jobs whose needs are done by then; returns as `run` does.

    All machines must see the folder `out` of the jobs.
    """
    failed = dict[Job, str]()
    waiting = to_do(jobs, wanted)
    print(f"{len(jobs)} jobs, {len(waiting)} of them to do", flush=True)
    while waiting:
        for job in waiting:
            if broken := [need for need in job.needs if need in failed]:
                failed[job] = f"it needs {broken[0].name}, which failed"
        ready = [job for job in waiting if job not in failed and all(map(done, job.needs))]
        for result in many.run(ready, _begin, done=done, cluster=cluster, shared=[out]):
            if result.error is not None:
                failed[result.task] = result.error
        waiting = [job for job in waiting if job not in failed and not done(job)]
    return failed


def _begin() -> Callable[[Job], float]:
    """The function that a worker of a cluster runs jobs with; nothing is prepared, as each job loads its own model."""
    return make


def _start(job: Job, slot: Slot | None, told: set[Path]) -> Running | None:
    """Starts a job, which has its lock then; None if another process holds it, or if the job is done by now."""
    job.folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context((job.folder / LOCK).open("w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if job.folder not in told:
                told.add(job.folder)
                print(f"{job.name}: a process that began before goes on with it; waiting for its end", flush=True)
            return None
        if done(job):
            return None
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": slot.gpus} if slot and slot.gpus is not None else {})
        with (job.folder / LOG).open("ab") as log:
            log.write(f"$ {' '.join(job.command)}\n".encode())
            log.flush()
            try:
                process = subprocess.Popen(
                    [program(job), *job.command[1:]],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    pass_fds=(lock.fileno(),),  # if the queue is killed, the lock lasts as long as the process
                    start_new_session=True,  # a Ctrl-C is for the queue, which then ends its jobs
                    preexec_fn=None if slot is None else (lambda: os.sched_setaffinity(0, slot.processors)),
                )
            except OSError as error:
                log.write(f"{error}\n".encode())
                raise OSError(f"{job.name}: {job.command[0]} cannot be started: {error.strerror}") from None
        stack.pop_all()  # the lock stays with the job until its end
        return Running(job, process, lock)


def _failure(job: Job, code: int) -> str:
    """The line that says how a job failed: the last one of its log."""
    log = job.folder / LOG
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LAST))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return f"exit code {code}: {lines[-1] if lines else ''} ({log})"


def _stop(running: Collection[Running]) -> None:
    """Ends jobs with all processes of their groups: they save what they made, or are killed after a while."""
    groups = [one.process.pid for one in running]
    _signal(groups, signal.SIGTERM)
    deadline = time.monotonic() + PATIENCE
    while any(map(_lives, groups)) and time.monotonic() < deadline:
        time.sleep(POLL)
    _signal(groups, signal.SIGKILL)
    for one in running:
        one.process.poll()
        one.lock.close()


def _signal(groups: Sequence[int], number: signal.Signals) -> None:
    for group in filter(_lives, groups):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, number)


def _lives(group: int) -> bool:
    """True if a process of the group lives: it may outlive the one that began the group, a shell, say.

    One that has ended does not count, though the system still lists it where nobody has waited for it.
    """
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended by now
            state, _, its = file.read_text(errors="replace").rpartition(")")[2].split()[:3]
            if int(its) == group and state not in "ZX":
                return True
    return False
