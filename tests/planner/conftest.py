"""Plans of the 14B stages before any mesh, made once."""

import dataclasses
from collections.abc import Callable

import pytest

from helios_jax.planner import program
from helios_jax.planner.analytic import Work
from helios_jax.sharding import MeshConfig


@pytest.fixture(scope="session", autouse=True)
def one_work_for_each_model():
    """A step is traced once for all settings that do not change its operations: mesh, batch and remat."""
    made, original = {}, Work.of

    def of(config):
        same = program.with_settings(config, mesh=MeshConfig(), batch_size=1, accumulate=1, remat=None)
        key = repr(dataclasses.replace(same, run="any"))
        if key not in made:
            made[key] = original(config)
        return dataclasses.replace(made[key], config=config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Work, "of", staticmethod(of))
        yield


@pytest.fixture(scope="session")
def work(one_work_for_each_model) -> Callable[..., Work]:
    """Of a config in configs/, by name, with overrides."""

    def make(name: str, *overrides: str) -> Work:
        return Work.of(program.open_config(f"configs/{name}.yaml", overrides))

    return make


@pytest.fixture(scope="session")
def stage1(work) -> Work:
    return work("stage1_init")
