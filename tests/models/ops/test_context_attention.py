"""Attention over devices that share tokens is attention on one. The devices are a mapped axis of that name."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from helios_jax.models.ops import attention as attentions
from helios_jax.models.ops import blockwise, context_attention
from helios_jax.models.ops.context_attention import Pieces, ring, ulysses
from helios_jax.models.transformer.packing import Packing
from helios_jax.sharding import AXES, CONTEXT
from pallas_kernels.attention import reference
from tests.closeness import assert_close

WAYS = 4
# In few blocks, and in many.
PIECES = {
    block: Pieces(
        partial(blockwise.blockwise_with_log_sums, block=block), partial(blockwise.blockwise_gradients, block=block)
    )
    for block in (10**6, 40)
}


def draw(packing: Packing, heads: int = 4):
    """Queries, keys, values and a cotangent of all tokens in order, the padding not zero but large."""
    rng, whole = np.random.default_rng(0), packing.whole
    assert whole is not None
    x = rng.standard_normal((4, 2, whole.num_tokens, heads * 8), np.float32)
    hidden = 100.0 * ~packing.present().reshape(-1)[:, None]
    laid = [packing.laid_out(jnp.asarray(a)) + hidden for a in x]
    shares = [a.reshape(2, WAYS, -1, heads, 8).swapaxes(0, 1) for a in laid]
    return [jnp.asarray(a.reshape(2, -1, heads, 8)) for a in x], shares


def in_order(packing: Packing, shares):
    """Tokens of all devices, without padding, in order; history, then noisy tokens."""
    ways, b, n, heads, head_dim = shares.shape
    x = shares.swapaxes(0, 1).reshape(b, ways, n, heads * head_dim)
    whole = packing.whole
    assert whole is not None
    cut = [x[:, :, : packing.history], x[:, :, packing.history :]]
    sizes = (whole.history, *whole.noisy)
    parts = [part.reshape(b, -1, heads * head_dim)[:, :size] for part, size in zip(cut, sizes, strict=True)]
    return jnp.concatenate(parts, 1).reshape(b, -1, heads, head_dim)


@pytest.mark.parametrize(
    ("op", "heads"),
    [(partial(ulysses, reference), 4), (partial(ring, PIECES[10**6]), 3), (partial(ring, PIECES[40]), 3)],
)
@pytest.mark.parametrize("whole", [Packing(13, (9,)), Packing(4, (8,)), Packing(2, (5,))])
def test_values_and_gradients_are_those_of_one_device(op, heads, whole):
    """With shares that are even, that end with padding, and that are nothing else."""
    packing = whole.shared(WAYS)
    (*arrays, cotangent), (*shares, cotangents) = draw(packing, heads)
    cotangents = cotangents * packing.present()[:, None, :, None, None]

    @jax.jit
    @partial(jax.vmap, axis_name=CONTEXT)
    def apart(*inputs):
        out, pull = jax.vjp(lambda *qkv: op(*qkv, packing.present()), *inputs[:-1])
        return out, pull(inputs[-1])

    out, gradients = apart(*shares, cotangents)
    expected, wanted = jax.jit(lambda *qkv: (reference(*qkv), jax.vjp(reference, *qkv)[1](cotangent)))(*arrays)
    assert_close(in_order(packing, out), expected)
    for got, want in zip(gradients, wanted, strict=True):
        assert_close(in_order(packing, got), want)
        hidden = got * ~packing.present()[:, None, :, None, None]
        np.testing.assert_array_equal(hidden, jnp.zeros_like(hidden))


def test_shares_are_equal_and_come_back_in_order():
    whole = Packing(history=5, noisy=(7, 2))
    packing = whole.shared(3)
    assert (packing.history, packing.noisy, packing.num_tokens) == (2, (3, 1), 8)
    x = jnp.arange(1.0, 20.0).reshape(1, 19, 1)  # 5 and 5 of history, 7 and 2 noisy
    laid = packing.laid_out(x)
    assert laid[0, :8, 0].tolist() == [1, 2, 6, 7, 11, 12, 13, 18]  # the first device's
    assert laid[0, 16:, 0].tolist() == [5, 0, 10, 0, 17, 0, 0, 0]
    np.testing.assert_array_equal(laid[0, :, 0] > 0, packing.present().reshape(-1))
    noisy = laid.reshape(1, 3, 8, 1)[:, :, packing.num_history :].reshape(1, -1, 1)
    assert [part[0, :, 0].tolist() for part in packing.noisy_parts(noisy)] == [[*range(11, 18)], [18, 19]]
    assert whole.shared(1) == whole
    assert whole.present() is None


@pytest.mark.parametrize(
    ("sizes", "heads", "reason"),
    [
        ((1, 1, 1, 3), 40, "context=3 does not divide the 40 heads"),
        ((1, 1, 4, 4), 40, r"does not divide the 10 heads of a device \(40 over tensor=4\)"),
        ((1, 1, 4, 5), 40, None),
        ((8, 1, 3, 8), 40, None),  # tensor leaves the heads whole
    ],
)
def test_ulysses_needs_heads_to_exchange(sizes, heads, reason):
    mesh = AbstractMesh(sizes, AXES)
    context_attention.check("ring", heads, mesh)
    if reason is None:
        context_attention.check("ulysses", heads, mesh)
        return
    with pytest.raises(ValueError, match=reason) as error:
        context_attention.check("ulysses", heads, mesh)
    assert "context_attention=ring" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_way_is_logged(caplog):
    attentions._say.cache_clear()
    q, packing = jnp.zeros((1, 2, 2, 8)), Packing(2, (2,)).shared(2)
    for context, line in (("ring", "attention around the ring by xla (cpu)"), ("ulysses", "attention by xla (cpu)")):
        with caplog.at_level("INFO", attentions.__name__):
            attentions._by_context(q, context, None)
        assert caplog.messages[-1].startswith(line)
    assert packing.num_tokens == 2
