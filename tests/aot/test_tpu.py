"""The model compiled for TPUs by XLA and Mosaic."""

import jax
import jax.numpy as jnp
import pytest

from helios_jax.models.ops.attention import attention
from helios_jax.runtime import aot
from helios_jax.runtime.compilation import precise
from tests.aot import programs

GB = 10**9
CHIPS = ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"]


@pytest.mark.parametrize(
    ("name", "n", "m", "head_dim"),
    [(name, *sizes) for name in CHIPS for sizes in ((1, 1, 64), (200, 333, 128))]
    + [("v5e:2x2", 32760, 32760, 128), ("v5p:2x2x1", 11040, 11040, 128), ("v6e:2x2", 11040, 11040, 128)],
)
def test_attention_has_gradients(tpu, report, name, n, m, head_dim):
    """Of two heads, as a device has in training over a mesh, and any length."""
    device = tpu(name)
    q, k = aot.on_device([programs.shape(1, length, 2, head_dim) for length in (n, m)], device)

    def gradients(q, k, v, cotangent):
        return jax.vjp(attention, q, k, v)[1](cotangent)

    program = aot.compiled(gradients, q, k, k, q, platform="tpu")
    assert programs.custom_calls(program)["tpu_custom_call"] == 2
    memory = report(f"attention's gradients, {n} queries", device, program)
    assert memory.temporaries < max(2 * n * m * 2 / 4, 1e7), (
        "more than a quarter of the logits, which are not to be kept"
    )


def test_attention_in_float32(tpu, report):
    """Multiplied as such (`compilation.precise`), by the block sizes that bfloat16 has."""
    device = tpu("v5e:2x2")
    q = aot.on_device(programs.shape(1, 11040, 2, 128, dtype=jnp.float32), device)
    with precise(jnp.float32):
        program = aot.compiled(attention, q, q, q, platform="tpu")
    assert programs.custom_calls(program)["tpu_custom_call"] == 1
    report("float32 attention, 11040 queries", device, program)


def test_attention_of_all_heads(tpu, report):
    """As in sampling; the other chips have it in their block."""
    device = tpu("v5e:2x2")
    q = aot.on_device(programs.shape(1, 11040, 40, 128), device)
    program = aot.compiled(attention, q, q, q, platform="tpu")
    assert programs.custom_calls(program)["tpu_custom_call"] == 1
    assert report("attention, 40 heads, 11040 queries", device, program).temporaries < 40 * 11040**2 * 2 / 4


@pytest.mark.parametrize("name", ["v5p:2x2x1", "v6e:2x2"])
def test_block(tpu, report, name):
    device = tpu(name)
    function, arguments = programs.block()
    arguments = aot.on_device(arguments, device)
    program = aot.compiled(function, *arguments, platform="tpu", donate=(1,))
    assert programs.custom_calls(program)["tpu_custom_call"] == 5
    assert report("block, 11040 tokens", device, program).temporaries < 1.2 * GB
