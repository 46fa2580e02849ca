"""Tokens that a GPU's products are padded by change nothing of the rest."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helios_jax.models.ops import attention as attentions
from helios_jax.models.ops.choices import Implementations
from helios_jax.models.transformer import Transformer
from helios_jax.models.transformer.packing import Packing
from pallas_kernels.attention import reference
from pallas_kernels.core.device import compiling_for
from tests import tiny
from tests.models.transformer.test_packing import inputs

H100 = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3")


def test_one_sequence_is_padded_on_a_gpu():
    one, two = Packing(3, (4,)), Packing(3, (4, 1))
    assert one.padded() == one
    with compiling_for(H100):
        padded = one.padded()
        assert padded == Packing(3, (4,), padding=1)
        assert Packing(3, (5,)).padded() == Packing(3, (5,))
        assert two.padded() == two
    assert padded.num_tokens == 7
    rows = jnp.asarray([[[0.0], [1.0]]])
    assert padded.rows(rows)[0, :, 0].tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    assert padded.runs(rows, history=False)[1] == (5,)
    with pytest.raises(ValueError, match="2 packed sequences cannot be padded"):
        Packing(3, (4, 1), padding=1)


@pytest.mark.parametrize("stacked", [False, True])
def test_the_velocity_and_its_gradients_are_the_same(stacked):
    config = dataclasses.replace(tiny.TRANSFORMER, num_layers=2)
    xla = Implementations("xla", "xla")  # a GPU's path, run on a CPU
    abstract = Transformer.abstract(config, stacked=stacked, implementations=xla)
    model = tiny.draw(abstract, np.random.default_rng(0))
    (latents,), timesteps, text, parts, indices = inputs(config, scales=(1,), size=(4, 6))
    tokens = []

    def run(model, latents):
        tokens.append(model._tokens((latents,), parts, indices)[0].shape[1])
        kv = model.text_kv(text)
        out, features = model.features(latents, timesteps[:, 0], kv, parts, indices, blocks=(0, 1))
        return jnp.sum(out**2) + sum(jnp.sum(x**2) for x in features), (out, features)

    expected = jax.jit(jax.grad(run, (0, 1), has_aux=True))(model, latents)
    with compiling_for(H100):
        got = jax.jit(jax.grad(lambda *x: run(*x), (0, 1), has_aux=True))(model, latents)
    assert tokens == [expected_tokens := tokens[0], -(-expected_tokens // 8) * 8]
    assert tokens[0] % 8
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.linalg.norm(a - b), 0, atol=2e-5 * float(np.linalg.norm(b)) + 1e-12)


@pytest.mark.parametrize("name", ["xla", "cudnn", "pallas"])
def test_no_implementation_sees_keys_that_are_padding(name, monkeypatch):
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 16, 2, 64)) for i in range(3))
    monkeypatch.setattr(attentions, "_choose", lambda query, asked: asked)

    def interpreted(query, key, value, lengths=None, *, key_value_seq_lengths=None, implementation):
        assert implementation == name
        return reference(query, key, value, lengths if key_value_seq_lengths is None else key_value_seq_lengths)

    monkeypatch.setattr(attentions.pallas, "attention", interpreted)
    monkeypatch.setattr(jax.nn, "dot_product_attention", interpreted)
    got = attentions.attention(q, k, v, num_keys=13, implementation=name)
    np.testing.assert_allclose(got, reference(q, k[:, :13], v[:, :13]), atol=1e-5)
    assert not np.allclose(got, reference(q, k, v), atol=1e-2)
