"""Several hosts on this machine: processes that join over loopback, each with its own CPU devices.

The processes are forked off one that has imported everything and started nothing, so they begin in a moment.
"""

import faulthandler
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.processes import environment

PATIENCE = 120  # seconds until a process that has not ended is taken for hung


@dataclass
class Host:
    """A process of a run, and the file of what it prints."""

    pid: int
    output: Path

    def kill(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    @property
    def said(self) -> str:
        return self.output.read_text()


class Hosts:
    """Starts runs of train.py on several hosts, and waits for them."""

    def __init__(self, folder: Path):
        self._folder, self._runs = folder, 0
        own = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
        self._parent = subprocess.Popen(
            [sys.executable, __file__],
            env={**environment(), **own},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(
        self,
        arguments: Sequence[str],
        *,
        hosts: int = 2,
        devices: int = 2,
        environments: Mapping[int, Mapping[str, str]] | None = None,
        folders: Sequence[Path] | None = None,
        slurm: bool = False,
    ) -> list[Host]:
        """Starts the same command on each host; `environments` adds variables to some, `folders` are their own.

        The hosts get the addresses of each other from the caller, or, with `slurm`, as tasks of Slurm have them.
        """
        self._runs += 1
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        started = []
        for number in range(hosts):
            output = self._folder / f"{self._runs}.{number}.txt"
            own = {"XLA_FLAGS": environment(devices)["XLA_FLAGS"], **(environments or {}).get(number, {})}
            if slurm:
                # With one task per node, as in deploy/slurm.sbatch; jax's port follows from the job's number.
                own |= {"SLURM_JOB_ID": "1", "JAX_COORDINATOR_PORT": str(port), "SLURM_LOCALID": "0"}
                own |= {"SLURM_STEP_NODELIST": "localhost,other", "SLURM_NTASKS": str(hosts)}
                own |= {"SLURM_PROCID": str(number), "JAX_LOCAL_DEVICE_IDS": "0,1"}
            elif hosts > 1:
                own |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_PROCESS_ID": str(number)}
            command = [*arguments, f"mesh.processes={'null' if slurm else hosts}"]
            folder = str(folders[number]) if folders else None
            started.append(Host(self._ask("start", command, own, str(output), folder), output))
        return started

    def wait(self, started: Sequence[Host]) -> list[int]:
        """The exit codes; a process that hangs is killed, and fails the test."""
        return [self._ask("wait", host.pid) for host in started]

    def run(self, arguments: Sequence[str], **options) -> list[Host]:
        """Runs the command on each host to its end, which must be good."""
        started = self.start(arguments, **options)
        codes = self.wait(started)
        assert not any(codes), "\n".join(host.said for host in started)
        return started

    def close(self) -> None:
        assert self._parent.stdin is not None
        self._parent.stdin.close()
        self._parent.wait()

    def _ask(self, *request) -> int:
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        print(json.dumps(request), file=self._parent.stdin, flush=True)
        return json.loads(self._parent.stdout.readline())


def serve() -> int:
    """Answers requests until the input ends; in a fork, the exit code of the run."""
    from helios_jax.runtime import hosts
    from helios_jax.training import cli, stage_table, trainer  # noqa: F401
    from tests.training import dummy  # noqa: F401

    for line in sys.stdin:
        what, *given = json.loads(line)
        if what == "start":
            command, variables, output, folder = given
            if pid := os.fork():
                print(pid, flush=True)
                continue
            os.environ.update(variables)
            hosts.JOIN_WITHIN = float(variables.get("JOIN_WITHIN", hosts.JOIN_WITHIN))
            file = os.open(output, os.O_WRONLY | os.O_CREAT)
            os.dup2(file, 1)
            os.dup2(file, 2)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            if folder:
                os.chdir(folder)
            faulthandler.enable()
            sys.argv = ["train.py", *command]
            return cli.entry_point()
        print(_code(given[0]), flush=True)
    return 0


def _code(pid: int) -> int:
    """The exit code of a process, negative for a signal, as soon as it ends."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, signal.SIGABRT)  # faulthandler tells where it hangs
    time.sleep(1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -signal.SIGKILL


if __name__ == "__main__":
    sys.exit(serve())
