"""The share of a GPU that programs get; errors that a smaller step would help, and others."""

import os
import re

import jax
import pytest
from jaxlib import xla_client

import sample
import train
from helios_jax.planner.machines import machine, target
from helios_jax.precompute import cli as precompute
from helios_jax.runtime.memory import GPU_SETTINGS, GPU_SHARE, is_out_of_memory, use_gpus_whole


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (train.main, ["configs/toy/vae.yaml", "steps=0"]),
        (sample.main, ["configs/toy/sample.yaml", "--num-frames", "0"]),
        (precompute.main, ["text", "--prompts", "none.txt", "--out", "none"]),
    ],
)
def test_programs_take_most_of_a_gpu(main, arguments, monkeypatch, capsys):
    for name in GPU_SETTINGS:
        monkeypatch.setenv(name, "")  # so that it is taken away at the end
        monkeypatch.delenv(name)
    assert main(arguments) == 2
    assert xla_client.generate_pjrt_gpu_plugin_options()["memory_fraction"] == GPU_SHARE
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.5")
    main(arguments)
    assert os.environ["XLA_CLIENT_MEM_FRACTION"] == "0.5"


@pytest.mark.parametrize("name", GPU_SETTINGS)
def test_what_the_user_says_about_a_gpu_stays(name):
    use_gpus_whole(environment := {name: "0.5"})
    assert environment == {name: "0.5"}


@pytest.mark.parametrize("kind", ["H100", "H200"])
def test_plans_count_on_the_memory_that_programs_get(kind):
    whole = re.search(r"device_memory_size: (\d+)", target(kind))
    assert whole is not None
    assert machine(kind).chip.memory == GPU_SHARE * int(whole[1])


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes"), True),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 35G of 31G"),
            True,
        ),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: E1001: Ran out of memory in memory space vmem while"), False),
        (jax.errors.JaxRuntimeError("INVALID_ARGUMENT: shapes"), False),
        (ValueError("RESOURCE_EXHAUSTED"), False),
    ],
)
def test_memory_of_devices_and_hosts_is_told_from_that_of_a_kernel(error, expected):
    assert is_out_of_memory(error) == expected
