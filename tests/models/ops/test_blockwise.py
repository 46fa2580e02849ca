"""Attention in blocks of queries: the numbers and gradients of attention at once, whatever divides what."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helios_jax.models.ops import attention as module
from helios_jax.models.ops.attention import attention
from helios_jax.models.ops.blockwise import CACHE, blockwise
from pallas_kernels.attention import reference
from tests.closeness import assert_close


def draw(n: int, m: int, dtype=jnp.float32) -> list[jax.Array]:
    rng = np.random.default_rng(n + m)
    return [jnp.asarray(rng.standard_normal((2, size, 3, 8)), dtype) for size in (n, m, m)]


@pytest.mark.parametrize(("n", "m"), [(1, 1), (7, 5), (64, 40), (61, 97)])
@pytest.mark.parametrize("block", [2**30, 1000])
def test_values_and_gradients_are_those_of_attention_at_once(n, m, block):
    def run(function):
        return jax.jit(jax.value_and_grad(lambda *x: jnp.sin(3 * function(*x)).sum(), (0, 1, 2)))(*draw(n, m))

    assert_close(run(partial(blockwise, block=block)), run(reference), terms=1)


def test_large_logits_do_not_overflow():
    query, key, value = draw(16, 16)
    got = blockwise(1e4 * query, key, value, block=CACHE)
    assert jnp.isfinite(got).all()
    np.testing.assert_allclose(got, reference(1e4 * query, key, value), rtol=1e-3, atol=1e-5)


def test_half_precision_stays_and_the_softmax_is_float32():
    query, key, value = draw(33, 500, jnp.bfloat16)
    got = blockwise(query, key, value, block=CACHE)
    exact = reference(*(x.astype(jnp.float32) for x in (query, key, value)))
    assert got.dtype == jnp.bfloat16
    assert jnp.linalg.norm(got.astype(jnp.float32) - exact) < 0.01 * jnp.linalg.norm(exact)


@pytest.mark.parametrize(("platform", "loops"), [("cpu", 2), ("cuda", 1), ("tpu", 1)])
def test_platforms_have_blocks_of_their_own(monkeypatch, platform, loops):
    """The first attention is too large for a CPU's caches, the second for any memory."""
    monkeypatch.setattr(module, "CACHE", 1000)
    monkeypatch.setattr(module, "MEMORY", 30_000)
    attend = partial(attention, implementation="xla")
    traced = jax.jit(lambda a, b: (attend(*a), attend(*b))).trace(draw(64, 64), draw(128, 128))
    assert traced.lower(lowering_platforms=(platform,)).as_text().count("stablehlo.while") == loops
