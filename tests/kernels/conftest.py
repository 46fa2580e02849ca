"""Mosaic GPU's interpreter in jax 0.10 compiles a kernel per warpgroup and block; this fixture compiles it once."""

import jax
import pytest


def _run(jaxpr, consts, *args):
    jax.core.eval_jaxpr(jaxpr, consts, *args)


def _run_jaxpr(jaxpr, consts, *args):
    jax.jit(_run, static_argnums=0).trace(jaxpr, consts, *args).lower().compile()(consts, *args)


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch):
    if jax.__version_info__ < (0, 11):
        monkeypatch.setattr("jax._src.pallas.mosaic.interpret.thread_map._run_jaxpr", _run_jaxpr)
