"""Mosaic GPU's interpreter compiles a kernel once for each warpgroup of each block, until jax 0.11; here only once."""

import jax
import pytest
from jax._src.pallas.mosaic.interpret import thread_map


def _run(jaxpr, consts, *args):
    jax.core.eval_jaxpr(jaxpr, consts, *args)


def _run_jaxpr(jaxpr, consts, *args):
    jax.jit(_run, static_argnums=0).trace(jaxpr, consts, *args).lower().compile()(consts, *args)


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch):
    if jax.__version_info__ < (0, 11):
        monkeypatch.setattr(thread_map, "_run_jaxpr", _run_jaxpr)
