"""Numbers of hosts by what Slurm, a TPU pod or the environment says, and the devices that each may use."""

import jax
import pytest
from jax._src import clusters, hardware_utils
from jax._src.clusters.cloud_tpu_cluster import GkeTpuCluster

from helios_jax.runtime.host_number import host_number, use_own_chips

SLURM = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "a,b", "SLURM_NTASKS": "4", "SLURM_PROCID": "3"}
SLURM["SLURM_LOCALID"] = "1"


@pytest.fixture
def visible(monkeypatch):
    """The GPUs that this process is told to use."""
    told = {}
    monkeypatch.setattr(jax.config, "update", lambda name, value: told.update({name: value}))
    return lambda: told.get("jax_cuda_visible_devices")


def set_all(monkeypatch, **variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_a_task_of_slurm_has_its_number_and_its_gpus(monkeypatch, visible):
    set_all(monkeypatch, **SLURM)
    assert (host_number(4), visible()) == (3, "1")
    monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", "0,1,2")
    assert (host_number(4), visible()) == (3, "0,1,2")
    with pytest.raises(ValueError, match=r"^--processes is 8: the cluster has 4 hosts; give their number$"):
        host_number(8)


def test_elsewhere_the_environment_has_the_number(monkeypatch, visible):
    with pytest.raises(ValueError, match=r"^--processes is 2: no TPU pod or Slurm says which host this is"):
        host_number(2)
    set_all(monkeypatch, JAX_PROCESS_ID="1")
    assert (host_number(2), visible()) == (1, None)
    with pytest.raises(ValueError, match=r"^--processes is 1: this host has number 1; the hosts are 0 to 0$"):
        host_number(1)


@pytest.mark.parametrize(("chips", "bounds"), [(4, "2,2,1"), (8, "2,4,1")])
def test_a_host_of_a_tpu_pod_uses_its_own_chips_alone(monkeypatch, visible, chips, bounds):
    """GKE's variables are of the whole slice."""
    monkeypatch.setattr(clusters.ClusterEnv, "_cluster_types", [GkeTpuCluster])
    monkeypatch.setattr(GkeTpuCluster, "is_env_present", lambda: True)
    monkeypatch.setattr(hardware_utils, "num_available_tpu_chips_and_device_id", lambda: (chips, None))
    pod = {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1", "TPU_HOST_BOUNDS": "1,1,2", "TPU_TOPOLOGY": "2x2x2"}
    set_all(monkeypatch, **pod, MEGASCALE_NUM_SLICES="1", MEGASCALE_SLICE_ID="0")
    assert (host_number(2), visible()) == (1, None)

    own = {"TPU_PROCESS_BOUNDS": "1,1,1", "TPU_CHIPS_PER_PROCESS_BOUNDS": bounds}
    own["TPU_VISIBLE_CHIPS"] = ",".join(map(str, range(chips)))
    use_own_chips(environment := {"PATH": "/bin"})
    assert environment == {"PATH": "/bin", **own}
    use_own_chips(environment := dict(pod))
    alone = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0", "TPU_HOST_BOUNDS": "1,1,1"}
    assert environment == {**own, **alone, "TPU_TOPOLOGY": bounds.replace(",", "x")}
    use_own_chips(environment := {"TPU_VISIBLE_CHIPS": "0"})
    assert environment == {"TPU_VISIBLE_CHIPS": "0"}
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a")
    use_own_chips(environment := {})
    assert environment == {}, "a slice of one host"
