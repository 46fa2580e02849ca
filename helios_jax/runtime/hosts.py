"""Agreement of the hosts of one run: they join, compare their inputs, and stop at the same step.

All of this goes through the key-value store of jax's coordination service, which the first host keeps. `host_watch`
ends all hosts when one fails.
"""

import contextlib
import os
import signal
import socket
import threading
import time
from typing import Any, NoReturn

import jax
from jax._src import clusters, distributed  # the clusters and the store have no public names
from jax.experimental import multihost_utils

from helios_jax.locations import location, wait_for_text
from helios_jax.runtime import interrupts

WAIT = 3600.0  # seconds that a host waits for another; if that one is gone, the watch ends it before
JOIN_WITHIN = 300.0  # seconds within which all hosts must have come
PROBE = 5.0  # seconds to reach host 0, when it is asked whether it is there
FOLDER = "helios_jax"  # prefix of the keys


class JoinError(ValueError):
    """Hosts that cannot be found; the message is one line."""


def join(processes: int | None) -> None:
    """Connects this process to the others of a run of `processes`; to be called before anything asks for devices.

    TPU pods and Slurm say where the others are, and how many if `processes` is None (1 where there is neither).
    Elsewhere JAX_COORDINATOR_ADDRESS (host:port of the first process) and JAX_PROCESS_ID (0 and up) say where. Raises
    JoinError when they cannot be found. Where some have not come after JOIN_WITHIN, the process ends with one line and
    exit code 2: jax itself would abort it, on the hosts that have come, with a stack trace.
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
    late = threading.Timer(JOIN_WITHIN, _give_up, (processes,))
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            num_processes=processes,
            process_id=None if number is None else int(number),
            initialization_timeout=int(JOIN_WITHIN + WAIT),  # later than the timer
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise JoinError(f"cannot join {processes} hosts: {reason}") from None
    finally:
        late.cancel()


def _give_up(processes: int) -> NoReturn:
    """Ends this process, to which not all others have come; says whether host 0 has."""
    address = distributed.global_state.coordinator_address
    reason = "host 0 was not found"
    if address is not None:
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), PROBE).close()
            reason = "not all came"
        except (OSError, ValueError):
            reason = f"host 0 does not answer at {address}"
    interrupts.end(
        f"cannot join {processes} hosts: {reason} within {JOIN_WITHIN:.0f} s; look for a host that ended with an error "
        "or was not started, then start all again",
        2,
    )


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
    seen = wait_for_text(path, name)
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


def agreed_signal(number: int, seen: signal.Signals | None) -> signal.Signals | None:
    """The signal that ends the run on all hosts, if any of them got one; `seen` is this host's signal.

    All hosts must call it equally often, with numbers that count up by one. A host that got SIGTERM tells the others
    through jax's preemption service, which catches it; they agree on a number that none of them has passed.
    """
    if not multihost_utils.reached_preemption_sync_point(number):
        return None
    numbers = [int(text) for text in gather(f"signal/{number}", str(int(seen or signal.SIGTERM)))]
    return signal.SIGINT if signal.SIGINT in numbers else signal.SIGTERM
