"""Errors that a smaller step would help, and others."""

import jax
import pytest

from helios_jax.runtime.memory import is_out_of_memory


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
