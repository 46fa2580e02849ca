"""Hosts that share a command's work without talking to each other: this one's number, and its own devices.

They need no `hosts.join`: with it no host could end before the others, and jax would take SIGTERM for itself.
"""

import os
from collections.abc import MutableMapping

import jax
from jax._src import clusters, hardware_utils  # they have no public names
from jax._src.clusters.cloud_tpu_cluster import BaseTpuCluster

# Chips of a TPU host -> how they lie there.
BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1", 8: "2,4,1"}
# Settings of libtpu: the hosts of a slice, the chips of each, and those that this process may use. GKE sets the older
# names of the first two, and the list of hosts.
OWN, OLDER = ("TPU_PROCESS_BOUNDS", "TPU_CHIPS_PER_PROCESS_BOUNDS"), ("TPU_HOST_BOUNDS", "TPU_CHIPS_PER_HOST_BOUNDS")
VISIBLE = ("TPU_VISIBLE_CHIPS", "TPU_VISIBLE_DEVICES")


def host_number(processes: int) -> int:
    """This host's number, from 0, among `processes` that run the same command: JAX_PROCESS_ID, or what a cluster says.

    TPU pods and Slurm say it. As in `hosts.join`, a task of Slurm gets the GPU of its number on its node, or those that
    JAX_LOCAL_DEVICE_IDS lists. To be called before anything asks for devices, and before `use_own_chips`. Raises
    ValueError, in one line, when there is no such number, or when the cluster has another number of hosts.
    """
    told = os.environ.get("JAX_PROCESS_ID")
    try:
        cluster = _cluster()
        if told is not None:
            number = int(told)
        elif cluster is None:
            raise ValueError("no TPU pod or Slurm says which host this is: set JAX_PROCESS_ID (0 and up) on each")
        elif (found := cluster.get_process_count()) != processes:
            raise ValueError(f"the cluster has {found} hosts; give their number")
        else:
            number = cluster.get_process_id()
        if not 0 <= number < processes:
            raise ValueError(f"this host has number {number}; the hosts are 0 to {processes - 1}")
        if cluster is not None and not issubclass(cluster, BaseTpuCluster):
            _use_own_gpus(cluster.get_local_process_id())
    except (ValueError, RuntimeError, OSError) as error:
        raise ValueError(f"--processes is {processes}: {str(error).splitlines()[0]}") from None
    return number


def use_own_chips(environment: MutableMapping[str, str] = os.environ) -> None:
    """Leaves this process the chips of its own host of a TPU pod, so that libtpu does not wait for the other hosts.

    By default all hosts of a slice must start their chips together. Nothing changes elsewhere, or where the environment
    says already which chips to use. To be called before anything asks for devices.
    """
    cluster = _cluster()
    if cluster is None or not issubclass(cluster, BaseTpuCluster) or cluster.get_process_count() == 1:
        return
    chips = hardware_utils.num_available_tpu_chips_and_device_id()[0]
    if chips not in BOUNDS or any(name in environment for name in (*OWN, *VISIBLE)):
        return
    bounds = "1,1,1", BOUNDS[chips]
    own = {**dict(zip(OWN, bounds)), VISIBLE[0]: ",".join(map(str, range(chips)))}
    sides = len(environment.get("TPU_TOPOLOGY", "").split("x"))
    of_gke = {
        **dict(zip(OLDER, bounds)),
        "TPU_TOPOLOGY": "x".join(BOUNDS[chips].split(",")[:sides]),
        "TPU_TOPOLOGY_WRAP": ",".join(["false"] * sides),
        "TPU_WORKER_ID": "0",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    environment.update(own | {name: value for name, value in of_gke.items() if name in environment})


def _cluster() -> type[clusters.ClusterEnv] | None:
    """The cluster that this process belongs to, as jax finds it."""
    found = (one for one in clusters.ClusterEnv._cluster_types if not one.opt_in_only_method and one.is_env_present())
    return next(found, None)


def _use_own_gpus(local: int | None) -> None:
    listed = os.environ.get("JAX_LOCAL_DEVICE_IDS") or (None if local is None else str(local))
    if listed is not None:
        jax.config.update("jax_cuda_visible_devices", listed)
        jax.config.update("jax_rocm_visible_devices", listed)
