"""Plans of the 14B stages before any mesh, made once."""

from collections.abc import Callable

import pytest

from helios_jax.planner import program
from helios_jax.planner.analytic import Work


@pytest.fixture(scope="session")
def work() -> Callable[..., Work]:
    """Of a config in configs/, by name, with overrides."""

    def make(name: str, *overrides: str) -> Work:
        return Work.of(program.open_config(f"configs/{name}.yaml", overrides))

    return make


@pytest.fixture(scope="session")
def stage1(work) -> Work:
    return work("stage1_init")
