"""Attention in blocks of queries: the numbers and gradients of attention at once, whatever divides what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helios_jax.models import attention as module
from helios_jax.models import blockwise as blocks
from helios_jax.models.attention import attention


def draw(n: int, m: int, dtype=jnp.float32) -> list[jax.Array]:
    rng = np.random.default_rng(n + m)
    return [jnp.asarray(rng.standard_normal((2, size, 3, 8)), dtype) for size in (n, m, m)]


@pytest.mark.parametrize(("n", "m"), [(1, 1), (7, 5), (64, 40), (61, 97)])
@pytest.mark.parametrize("block", [2**30, 1000])
def test_values_and_gradients_are_those_of_attention_at_once(monkeypatch, n, m, block):
    monkeypatch.setattr(blocks, "WHOLE", block)
    monkeypatch.setattr(blocks, "BLOCK", block)

    def run(function):
        return jax.value_and_grad(lambda *x: jnp.sin(3 * function(*x)).sum(), (0, 1, 2))(*draw(n, m))

    got, expected = (jax.tree.leaves(run(f)) for f in (blocks.blockwise, module._at_once))
    for a, b in zip(got, expected):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=3e-5)


def test_large_logits_do_not_overflow():
    query, key, value = draw(16, 16)
    got = blocks.blockwise(1e4 * query, key, value)
    assert jnp.isfinite(got).all()
    np.testing.assert_allclose(got, module._at_once(1e4 * query, key, value), rtol=1e-3, atol=1e-5)


def test_half_precision_stays_and_the_softmax_is_float32():
    query, key, value = draw(33, 500, jnp.bfloat16)
    got = blocks.blockwise(query, key, value)
    exact = module._at_once(*(x.astype(jnp.float32) for x in (query, key, value)))
    assert got.dtype == jnp.bfloat16
    assert jnp.linalg.norm(got.astype(jnp.float32) - exact) < 0.01 * jnp.linalg.norm(exact)


@pytest.mark.parametrize(("platform", "loops"), [("cpu", 1), ("cuda", 0), ("tpu", 0)])
def test_only_cpus_take_blocks(monkeypatch, platform, loops):
    monkeypatch.setattr(blocks, "WHOLE", 1000)
    monkeypatch.setattr(blocks, "BLOCK", 1000)
    traced = jax.jit(lambda *x: attention(*x, implementation="xla")).trace(*draw(64, 64))
    assert traced.lower(lowering_platforms=(platform,)).as_text().count("stablehlo.while") == loops
