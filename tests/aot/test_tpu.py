"""What XLA and Mosaic make of the model for TPUs."""

import jax
import jax.numpy as jnp
import pytest

from helios_jax import compile as compilation
from helios_jax.models.attention import attention
from tests.aot import programs

GB = 10**9
CHIPS = ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"]


@pytest.mark.parametrize("name", CHIPS)
@pytest.mark.parametrize("heads", [2, 40])
def test_attention_forward_and_backward(tpu, report, name, heads):
    """Two heads with gradients, as a device has in training over a mesh; all of them without, as in sampling."""
    device = tpu(name)
    q = compilation.on_device(programs.shape(1, 11040, heads, 128), device)

    def loss(q, k, v):
        return attention(q, k, v).astype(jnp.float32).sum()

    function = jax.grad(loss, (0, 1, 2)) if heads == 2 else attention
    program = compilation.compiled(function, q, q, q, platform="tpu")
    assert compilation.custom_calls(program)["tpu_custom_call"] == (2 if heads == 2 else 1)
    memory = report(f"attention, {heads} heads{', gradients' if heads == 2 else ''}", device, program)
    assert memory.temporaries < heads * 11040**2 * 2 / 4, "more than a quarter of the logits, which are not to be kept"


@pytest.mark.parametrize("name", ["v5p:2x2x1", "v6e:2x2"])
def test_block(tpu, report, name):
    device = tpu(name)
    function, arguments = programs.block()
    arguments = compilation.on_device(arguments, device)
    program = compilation.compiled(function, *arguments, platform="tpu", donate=(1,))
    assert compilation.custom_calls(program)["tpu_custom_call"] == 5
    assert report("block, 11040 tokens", device, program).temporaries < 1.2 * GB
