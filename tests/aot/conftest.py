"""Devices to compile for, and a table of what was compiled. jax itself runs on the CPU: the rest is not here."""

from collections.abc import Callable
from typing import Any

import jax
import pytest

from helios_jax.planner import machines
from helios_jax.runtime import aot

jax.config.update("jax_platforms", "cpu")
ROWS = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def h100() -> Any:
    return aot.gpu_topology(machines.target()).devices[0]


@pytest.fixture(scope="session")
def tpu() -> Callable[[str], Any]:
    """A chip of a slice, such as "v5p:2x2x1"."""
    return lambda name: aot.tpu_topology(name).devices[0]


@pytest.fixture
def report(request) -> Callable[[str, Any, Any], aot.Memory]:
    """Notes a program and its device for the table, and returns its memory."""

    def note(name: str, device: Any, program: Any) -> aot.Memory:
        memory = aot.memory(program)
        numbers = (memory.temporaries, memory.arguments, memory.peak)
        row = f"{name:42} {device.device_kind:24}" + "".join(f"{number / 1e9:12.3f}" for number in numbers)
        request.config.stash.setdefault(ROWS, []).append(row)
        return memory

    return note


def pytest_terminal_summary(terminalreporter, config) -> None:
    terminalreporter.section("compiled, sizes in GB")
    terminalreporter.write_line(f"{'program':42} {'device':24}{'temporaries':>12}{'arguments':>12}{'peak':>12}")
    for row in config.stash.get(ROWS, []):
        terminalreporter.write_line(row)
