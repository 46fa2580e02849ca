"""The discriminator's convolutions: products on CPUs, convolutions elsewhere. Its values: tests/parity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from helios_jax.models.discriminator import Head, HeadConv
from tests.closeness import assert_close


@pytest.mark.parametrize("layer", range(len(Head.SHAPES)))
def test_product_is_the_convolution(layer):
    """Forward and backward, also where a stride leaves a rest."""
    kernel, stride, padding = Head.SHAPES[layer]
    conv = HeadConv(5, 6, kernel, stride=stride, padding=[(p, p) for p in padding], rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 9, 8, 7, 5), np.float32))

    def gradients(convolve):
        return jax.jit(jax.value_and_grad(lambda x, w: jnp.square(convolve(x, w)).sum(), (0, 1)))(x, conv.weight[...])

    ours, expected = map(jax.tree.leaves, (gradients(conv._multiply), gradients(super(HeadConv, conv).convolve)))
    for one, other in zip(ours, expected, strict=True):
        assert_close(one, other, ulps=60)


@pytest.mark.parametrize(("platform", "convolutions"), [("cpu", 0), ("cuda", 18), ("tpu", 18)])
def test_platforms(platform, convolutions):
    """Forward and the two gradients of six layers, in a branch as in training."""
    graph, head = nnx.split(Head(5, 32, rngs=nnx.Rngs(0)))

    def gradients(on, head, x):
        loss = jax.grad(lambda head, x: nnx.merge(graph, head)(x).sum(), (0, 1))
        return jax.lax.cond(on, loss, lambda *same: same, head, x)

    program = jax.jit(gradients).trace(True, head, jnp.zeros((1, 9, 8, 8, 5))).lower(lowering_platforms=(platform,))
    assert program.as_text().count("stablehlo.convolution(") == convolutions


def test_first_weights_have_the_deviation_of_torch():
    """kaiming_uniform_ with a = sqrt(5), the default of torch's layers: 1 / sqrt(3 inputs)."""
    head = Head(16, 32, rngs=nnx.Rngs(0))
    for layer in (*head.convs, head.out):
        weight = layer.weight[...]
        inputs = weight.size // weight.shape[-1]
        assert float(weight.std()) == pytest.approx((3 * inputs) ** -0.5, rel=0.15)
        assert float(jnp.abs(weight).max()) <= inputs**-0.5
