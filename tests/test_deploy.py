"""Launch files in deploy/: the commands that they give, in every turn a rented machine may take.

No cloud is asked: `fake_cloud.sh` stands in for gcloud, srun and the commands of a TPU host.
"""

import fnmatch
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from helios_jax.runtime.host_watch import GONE_CODE
from helios_jax.training.run_config import TrainConfig
from helios_jax.training.stage_table import load_config

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
FAKES = ("gcloud", "git", "sudo", "mountpoint", "python3", "systemd-run", "systemctl", "journalctl", "srun", "scontrol")
SLICE = {"TPU": "helios", "ZONE": "us-east5-a", "TYPE": "v5p-128", "SHARE": "10.0.0.2:/helios", "POLL": "0"}
PROMPT = 'validation.prompts=["a cat\'s $HOME, 100% `real`; really"]'
TRAIN = ["train.py", "configs/stage1_init.yaml", PROMPT]


class Cloud:
    """The folder of `fake_cloud.sh`: what it answers, and the commands that it was given."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "bin").mkdir()
        for name in FAKES:
            (folder / "bin" / name).symlink_to(Path(__file__).with_name("fake_cloud.sh"))
        self.answer(states="ACTIVE", codes="0", dirty="0", calls="")

    def answer(self, **files: str) -> None:
        for name, text in files.items():
            (self.folder / name).write_text("".join(f"{word}\n" for word in text.split()))

    def call(self, *command: str, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "FAKE": str(self.folder), **variables}
        return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=60)

    def tpu(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return self.call(str(DEPLOY / "tpu.sh"), *arguments, **SLICE, **variables)

    def calls(self, *start: str) -> list[list[str]]:
        """The words of each call that begins with `start`."""
        calls = [line.split("\t") for line in (self.folder / "calls").read_text().splitlines()]
        return [words for words in calls if words[: len(start)] == list(start)]

    def gcloud(self, *start: str) -> list[list[str]]:
        return self.calls("gcloud", "compute", "tpus", *start)

    @property
    def arguments(self) -> list[str]:
        """Arguments that python or srun was started with."""
        return (self.folder / "arguments").read_text().split("\0")[:-1]


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


@pytest.mark.parametrize("name", ["deploy/tpu.sh", "deploy/slurm.sbatch", "tests/fake_cloud.sh"])
def test_scripts_are_bash(name):
    subprocess.run(["bash", "-n", str(ROOT / name)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(ROOT / name)], check=True)


@pytest.mark.parametrize(
    ("arguments", "settings", "told"),
    [
        ([], SLICE, "one of up, run, logs, stop and down is needed, got: nothing"),
        (["start"], SLICE, "one of up, run, logs, stop and down is needed, got: start"),
        (["up", "--preemptible"], SLICE, "up takes --spot or nothing, got: --preemptible"),
        (["run"], SLICE, "run needs what python runs, as in: run train.py configs/stage1_init.yaml"),
        (["up"], {**SLICE, "SHARE": ""}, "SHARE is not set; as in: export TPU=helios ZONE="),
        (["down"], {}, "TPU is not set; as in: export TPU=helios ZONE="),
    ],
)
def test_missing_arguments_are_told_in_one_line(cloud, arguments, settings, told):
    done = cloud.call(str(DEPLOY / "tpu.sh"), *arguments, **settings)
    assert done.returncode == 2
    assert done.stderr.startswith(f"tpu.sh: {told}")
    assert done.stderr.count("\n") == 1
    assert cloud.calls() == []


def test_up_asks_waits_and_installs(cloud):
    cloud.answer(states="ABSENT WAITING_FOR_RESOURCES UNKNOWN PROVISIONING ACTIVE")
    done = cloud.tpu("up", "--spot")
    assert done.returncode == 0, done.stderr
    (create,) = cloud.gcloud("queued-resources", "create")
    assert create[1:] == [
        *["compute", "tpus", "queued-resources", "create", "helios", "--zone=us-east5-a", "--node-id=helios"],
        *["--accelerator-type=v5p-128", "--runtime-version=v2-alpha-tpuv5", "--spot"],
    ]
    (mount,) = cloud.calls("sudo", "mount")
    assert "DPkg::Lock::Timeout=300" in cloud.calls("sudo", "apt-get")[-1]
    assert mount[2:] == ["-t", "nfs", "-o", "hard", SLICE["SHARE"], "/mnt/helios"]
    assert cloud.calls("python3", "-m", "uv", "pip")[0][-1] == "jax[tpu]"
    assert cloud.gcloud("tpu-vm", "scp")
    for words in cloud.gcloud("tpu-vm"):
        assert "--worker=all" in words
    assert (cloud.folder / "host" / "helios_jax" / ".ready").exists()


def test_up_leaves_a_slice_that_is_there_and_refuses_what_hosts_would_not_get(cloud):
    (cloud.folder / "host").mkdir()
    assert cloud.tpu("up").returncode == 0
    assert cloud.gcloud("queued-resources", "create") == []
    (cloud.folder / "host" / ".running").touch()
    (cloud.folder / "host" / ".mounted").unlink()
    done = cloud.tpu("up")
    told = "tpu.sh: a run goes on there; end it with deploy/tpu.sh stop first\n"
    assert (done.returncode, done.stderr.partition("ACTIVE\n")[2]) == (2, told)
    assert len(cloud.gcloud("tpu-vm", "scp")) == 1, "its files would be gone"
    cloud.answer(dirty="1", calls="")
    done = cloud.tpu("up")
    assert (done.returncode, done.stderr) == (2, "tpu.sh: the hosts get the last commit: commit your changes first\n")
    assert cloud.calls("gcloud") == []
    cloud.answer(dirty="0", states="FAILED")
    done = cloud.tpu("up")
    assert done.returncode == 2
    assert "delete it with deploy/tpu.sh down" in done.stderr


def test_run_gives_python_every_word_and_ends_when_it_is_done(cloud):
    cloud.answer(states="ABSENT ACTIVE")
    cloud.tpu("up")
    done = cloud.tpu("run", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert cloud.arguments == TRAIN
    (start,) = cloud.calls("systemd-run")
    assert {"--unit=helios", "--property=KillMode=mixed", "--setenv=HF_HOME=/mnt/helios/huggingface"} <= set(start)
    assert "--setenv=JAX_COMPILATION_CACHE_DIR=/mnt/helios/xla" in start
    assert "deploy/tpu.sh down" in done.stderr, "a slice that is done goes on costing"

    cloud.answer(calls="")
    (cloud.folder / "host" / ".ended").unlink()
    precompute = ["-m", "helios_jax.precompute", "clips", "--json", "my clips.json"]
    assert cloud.tpu("run", *precompute, JAX_COMPILATION_CACHE_DIR="gs://my bucket/xla").returncode == 0
    assert cloud.arguments == precompute
    assert "--setenv=JAX_COMPILATION_CACHE_DIR=gs://my bucket/xla" in cloud.calls("systemd-run")[0]


@pytest.mark.parametrize(
    ("codes", "starts", "code"),
    [
        ("75 0", 2, 0),
        ("75 130 76 15 75 0", 6, 0),
        ("76 76 76 76 0", 5, 0),
        ("1 0", 2, 0),
        ("1 75 9 1 1", 5, 1),
        ("2", 1, 2),
    ],
)
def test_run_starts_again_what_was_stopped_or_lost_a_host_and_thrice_what_failed(cloud, codes, starts, code):
    cloud.answer(states="ABSENT ACTIVE", codes=codes)
    cloud.tpu("up")
    done = cloud.tpu("run", *TRAIN)
    assert done.returncode == code, done.stderr
    assert len(cloud.calls("systemd-run")) == starts
    assert cloud.gcloud("queued-resources", "delete") == []


def test_failures_of_runs_that_lasted_are_not_counted_together(cloud):
    cloud.answer(states="ABSENT ACTIVE", codes="1 1 9 1 1 0")
    cloud.tpu("up")
    done = cloud.tpu("run", *TRAIN, LASTED="0")
    assert done.returncode == 0, done.stderr
    assert len(cloud.calls("systemd-run")) == 6


def test_run_asks_for_another_slice_after_preemption(cloud):
    cloud.answer(states="ABSENT ACTIVE")
    cloud.tpu("up", "--spot")
    looks = "ACTIVE ACTIVE UNKNOWN SUSPENDING SUSPENDED WAITING_FOR_RESOURCES ACTIVE"
    cloud.answer(states=looks, codes="75 0", calls="")
    done = cloud.tpu("run", "--spot", *TRAIN)
    assert done.returncode == 0, done.stderr
    order = [words[0] if words[0] != "gcloud" else " ".join(words[3:5]) for words in cloud.calls()]
    order = [word for word in order if word in ("systemd-run", "queued-resources delete", "queued-resources create")]
    assert order == ["systemd-run", "queued-resources delete", "queued-resources create", "systemd-run"]
    assert cloud.gcloud("queued-resources", "create")[0][-1] == "--spot"
    assert {"--force", "--quiet"} <= set(cloud.gcloud("queued-resources", "delete")[0])
    assert cloud.arguments == TRAIN


def test_logs_stop_and_down(cloud):
    (cloud.folder / "host").mkdir()
    for verb in (["logs", "3"], ["stop"], ["down"]):
        assert cloud.tpu(*verb).returncode == 0
    assert "--worker=3" in cloud.gcloud("tpu-vm", "ssh")[0]
    assert "--unit=helios" in cloud.calls("journalctl")[0]
    assert cloud.calls("systemctl") == [["systemctl", "stop", "helios"]]
    assert {"helios", "--zone=us-east5-a", "--force"} <= set(cloud.gcloud("queued-resources", "delete")[0])


@pytest.mark.parametrize(
    ("code", "requeued"), [(0, False), (75, True), (76, True), (130, True), (1, False), (2, False)]
)
def test_slurm_gives_every_word_and_requeues_what_was_stopped(cloud, code, requeued):
    python = cloud.folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("")
    python.chmod(0o755)
    cloud.answer(code=str(code))
    job = {"SLURM_JOB_ID": "17", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "64"}
    done = cloud.call("bash", str(DEPLOY / "slurm.sbatch"), *TRAIN[1:], cwd=cloud.folder, **job)
    assert done.returncode == (0 if requeued else code), done.stderr
    assert (cloud.calls("scontrol") == [["scontrol", "requeue", "17"]]) == requeued
    command = cloud.arguments[cloud.arguments.index(".venv/bin/python") :]
    mesh = ["mesh.fsdp=8", "optim.accumulate=8", "remat=block"]
    assert command == [".venv/bin/python", "train.py", TRAIN[1], *mesh, PROMPT]
    assert {"--kill-on-bad-exit=1", "--cpus-per-task=64"} <= set(cloud.arguments)
    assert (cloud.folder / "devices").read_text() == "0,1,2,3,4,5,6,7"
    assert (cloud.folder / "compiled").read_text() == str(cloud.folder / "runs" / "xla")
    config = load_config(str(ROOT / TRAIN[1]), command[3:])
    assert config.mesh.processes is None
    assert config.data.batch_size % (config.optim.accumulate * 16) == 0


def test_slurm_directives():
    script = (DEPLOY / "slurm.sbatch").read_text()
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?", script, re.MULTILINE))
    assert directives["ntasks-per-node"] == "1"  # jax counts a process for each task
    assert directives["gpus-per-node"] == "8"
    assert directives["signal"] == "TERM@300"  # to the steps; B: would signal this script alone
    assert "requeue" in directives
    assert directives["open-mode"] == "append"


@pytest.fixture(scope="module")
def jobset():
    return yaml.safe_load((DEPLOY / "jobset.yaml").read_text())


# Fields of JobSet (jobset.x-k8s.io/v1alpha2), Job (batch/v1) and Pod (v1) that the file uses; {} may have any keys.
FIELDS = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str, "annotations": {}},
    "spec": {
        "network": {"enableDNSHostnames": bool, "subdomain": str},
        "failurePolicy": {
            "maxRestarts": int,
            "rules": [{"name": str, "action": str, "onJobFailureReasons": [str]}],
        },
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": "job"}}],
    },
}
JOB = {
    **{"parallelism": int, "completions": int, "completionMode": str, "backoffLimit": int},
    "podFailurePolicy": {
        "rules": [
            {
                "action": str,
                "onExitCodes": {"containerName": str, "operator": str, "values": [int]},
                "onPodConditions": [{"type": str, "status": str}],
            }
        ]
    },
    "template": {
        "spec": {
            **{"restartPolicy": str, "terminationGracePeriodSeconds": int, "nodeSelector": {}},
            "containers": [
                {
                    **{"name": str, "image": str, "args": [str], "env": [{"name": str, "value": str}]},
                    "ports": [{"containerPort": int}],
                    "securityContext": {"privileged": bool, "runAsUser": int},
                    "resources": {"limits": {}},
                    "volumeMounts": [{"name": str, "mountPath": str}],
                }
            ],
            "volumes": [{"name": str, "nfs": {"server": str, "path": str}, "emptyDir": {"medium": str}}],
        }
    },
}


def misfits(value, fields, path="") -> list[str]:
    """The paths at which `value` has a key or a type that `fields` has not."""
    fields = JOB if fields == "job" else fields
    if isinstance(fields, type):
        return [] if type(value) is fields else [path]
    if type(value) is not type(fields):
        return [path]
    if isinstance(fields, list):
        return [found for part in value for found in misfits(part, fields[0], f"{path}[]")]
    if not fields:
        return []
    unknown = [f"{path}.{key}" for key in value if key not in fields]
    known = [misfits(part, fields[key], f"{path}.{key}") for key, part in value.items() if key in fields]
    return sum(known, unknown)


def test_jobset_fits_its_schema(jobset):
    assert misfits(jobset, FIELDS) == []
    assert misfits({"kind": 1, "extra": {}}, FIELDS) == [".extra", ".kind"]
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")


def test_jobset_has_a_pod_for_each_host_of_the_slice(jobset):
    (slice_,) = jobset["spec"]["replicatedJobs"]
    job = slice_["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    hosts = chips // container["resources"]["limits"]["google.com/tpu"]
    assert (job["parallelism"], job["completions"], job["completionMode"]) == (hosts, hosts, "Indexed")
    assert jobset["spec"]["network"] == {"enableDNSHostnames": True, "subdomain": jobset["metadata"]["name"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}

    script, path, *overrides = container["args"]
    config = load_config(str(ROOT / path), overrides)
    assert script == "train.py"
    assert config.mesh.processes is None
    assert chips % config.mesh.fsdp == config.data.batch_size // config.optim.accumulate % chips == 0
    compiled = {variable["name"]: variable["value"] for variable in container["env"]}["JAX_COMPILATION_CACHE_DIR"]
    for folder in (config.run, config.data.folder, compiled):
        assert folder.startswith(container["volumeMounts"][0]["mountPath"])
    assert f'--command "python train.py {path} ' in (DEPLOY / "jobset.yaml").read_text(), "of xpk"


def test_jobset_starts_again_what_was_stopped(jobset):
    """A pod that ends with code 0 is done for good, so a stopped run must end with another."""
    policy = jobset["spec"]["failurePolicy"]
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    codes, conditions = job["podFailurePolicy"]["rules"]
    assert {TrainConfig().stopped_code, GONE_CODE} <= set(codes["onExitCodes"]["values"])
    assert not {0, 1, 2, 137} & set(codes["onExitCodes"]["values"])
    assert codes["onExitCodes"]["containerName"] == pod["containers"][0]["name"]
    assert conditions["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert {rule["action"] for rule in (codes, conditions)} == {"FailJob"}  # its reason is PodFailurePolicy
    (rule,) = policy["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("RestartJobSetAndIgnoreMaxRestarts", ["PodFailurePolicy"])
    assert policy["maxRestarts"] > 0
    assert (job["backoffLimit"], pod["restartPolicy"]) == (0, "Never")  # which podFailurePolicy asks for
    assert pod["terminationGracePeriodSeconds"] > 60


def dockerfile() -> dict[str, list[str]]:
    """The arguments of each kind of instruction, in order."""
    found: dict[str, list[str]] = {}
    text = re.sub(r"\\\n\s*", " ", (DEPLOY / "Dockerfile").read_text())
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, rest = line.split(maxsplit=1)
            found.setdefault(name, []).append(rest)
    return found


def test_dockerfile_copies_what_is_there_and_runs_as_a_user(tmp_path):
    lines = dockerfile()
    assert set(lines) <= {"FROM", "ARG", "RUN", "COPY", "WORKDIR", "USER", "ENV", "ENTRYPOINT", "CMD"}
    assert (lines["ENTRYPOINT"], lines["ARG"]) == (['["python"]'], ["ACCELERATOR"])
    assert lines["USER"] not in (["root"], ["0"])
    assert "requirements.txt" in lines["COPY"][0]
    assert any("jax[$ACCELERATOR]" in line for line in lines["RUN"])
    assert not re.search(r"TOKEN|SECRET|PASSWORD|KEY", " ".join(lines["ENV"] + lines["ARG"]))
    ignored = (ROOT / ".dockerignore").read_text().split("\n")
    assert ignored[1] == "*"
    kept = [line[1:] for line in ignored if line.startswith("!")]
    copied = [source for line in lines["COPY"] for source in line.split()[:-1]]
    assert sorted(copied) == sorted(kept)
    for source in copied:
        assert (ROOT / source).exists()
        (tmp_path / source).symlink_to(ROOT / source)
    # Nothing else of the checkout is needed: the config is found, and checked.
    command = [sys.executable, "train.py", "configs/stage1_init.yaml", "steps=0"]
    environment = {**os.environ, "PYTHONPATH": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, "steps must be at least 1" in done.stderr) == (2, True), done.stderr


@pytest.mark.parametrize(("accelerator", "code"), [("tpu", 0), ("cuda13", 0), ("", 2), ("cuda12", 2)])
def test_dockerfile_names_its_accelerators(accelerator, code):
    check = dockerfile()["RUN"][0]
    done = subprocess.run(["sh", "-c", check], env={"ACCELERATOR": accelerator}, capture_output=True, text=True)
    assert done.returncode == code, done.stderr


def test_image_has_the_python_that_hosts_get():
    version = re.search(r"python:([\d.]+)", dockerfile()["FROM"][0])
    assert version is not None
    assert f"--python {version[1]} " in (DEPLOY / "tpu.sh").read_text()
    assert fnmatch.fnmatch(version[1], "3.1[1-9]"), "pyproject.toml needs 3.11 or newer"
