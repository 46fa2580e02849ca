"""Attention whose tokens are split over the mesh's `context`, by all-to-all (Ulysses) or around a ring.

Ulysses (arXiv 2309.14509) exchanges tokens for heads: each device attends with some of the heads to all tokens, by the
implementation that it would use alone. Ring attention (arXiv 2310.01889) keeps the queries: keys and values go from
device to device, and the softmax is merged by log-sum-exp. Both run where each device has its own arrays
(`mesh_axes.each_device`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Shaped

from helios_jax.models.ops.blockwise import LOWEST
from helios_jax.models.ops.token_runs import runs_of, take
from helios_jax.sharding import CONTEXT, RULES, ContextAttention
from pallas_kernels.attention import KEPT_ATTENTION

Present = Bool[np.ndarray, "ways m"]  # True for the keys of each device's share that are no padding


class Pieces(NamedTuple):
    """Attention to one piece of the keys that queries see, in float32; keys past a length are padding."""

    forward: Callable[..., tuple[Array, Array]]  # (query, key, value, length) -> (output, log sums [b, heads, n])
    # (query, key, value, cotangent, log sums and dots over all keys, length) -> gradients of the first three
    gradients: Callable[..., tuple[Array, Array, Array]]


def check(context: ContextAttention, heads: int, mesh: Any) -> None:
    """Raises ValueError when Ulysses cannot divide the `heads` over `mesh` (None: one device)."""
    if mesh is None or mesh.empty or context != "ulysses":
        return
    tensor, ways = mesh.shape[RULES["heads"]], mesh.shape[CONTEXT]
    own = heads // tensor if heads % tensor == 0 else heads
    if own % ways:
        raise ValueError(
            f"mesh: context={ways} does not divide the {own} heads of a device ({heads} over tensor={tensor}), which "
            "ulysses exchanges; give another size, or ask for context_attention=ring"
        )


def ulysses(
    attend: Callable[..., Array],
    query: Float[Array, "b n heads head_dim"],
    key: Float[Array, "b m heads head_dim"],
    value: Float[Array, "b m heads head_dim"],
    present: Present,
) -> Float[Array, "b n heads head_dim"]:
    """Runs `attend` on this device's share of the heads over all tokens, between two exchanges of tokens for heads."""
    query, key, value = (jax.lax.all_to_all(x, CONTEXT, 2, 1, tiled=True) for x in (query, key, value))
    runs = runs_of(present.reshape(-1))
    key, value = take(key, runs), take(value, runs)
    return jax.lax.all_to_all(attend(query, key, value), CONTEXT, 1, 2, tiled=True)


def ring(
    pieces: Pieces,
    query: Float[Array, "b n heads head_dim"],
    key: Float[Array, "b m heads head_dim"],
    value: Float[Array, "b m heads head_dim"],
    present: Present,
) -> Float[Array, "b n heads head_dim"]:
    """Attention of this device's queries to the keys of all devices, one device's share after the other."""
    ways, dtype = len(present), query.dtype
    to_next = [(i, (i + 1) % ways) for i in range(ways)]

    def length(step: Array | int) -> Array:
        """The number of keys, without padding, in the share that this device holds after so many steps."""
        return jnp.asarray(present.sum(1), jnp.int32)[(jax.lax.axis_index(CONTEXT) - step) % ways]

    def rotated(*arrays: Array) -> tuple[Array, ...]:
        return tuple(jax.lax.ppermute(x, CONTEXT, to_next) for x in arrays)

    def forward(query: Array, key: Array, value: Array) -> tuple[Array, Array]:
        def merge(sums: tuple[Array, Array], key: Array, value: Array, step: Array | int) -> tuple[Array, Array]:
            out, log_sums = pieces.forward(query, key, value, length(step))
            total = jnp.logaddexp(sums[1], log_sums)
            before, now = (jnp.moveaxis(jnp.exp(x - total), 1, 2)[..., None] for x in (sums[1], log_sums))
            return sums[0] * before + out.astype(jnp.float32) * now, total

        def turn(carry: tuple[Array, ...], step: Array) -> tuple[tuple[Array, ...], None]:
            key, value, *sums = carry
            # Sent before they are used: the next share is on its way while this one is computed.
            following = rotated(key, value)
            return (*following, *merge((sums[0], sums[1]), key, value, step)), None

        b, n, heads, _ = query.shape
        initial = jnp.zeros(query.shape, jnp.float32), jnp.full((b, heads, n), LOWEST, jnp.float32)
        (key, value, *sums), _ = jax.lax.scan(turn, (key, value, *initial), jnp.arange(ways - 1))
        out, log_sums = merge((sums[0], sums[1]), key, value, ways - 1)
        return out.astype(dtype), log_sums

    @jax.custom_vjp
    def attend(query: Array, key: Array, value: Array) -> Array:
        return forward(query, key, value)[0]

    def keep(query: Array, key: Array, value: Array) -> tuple[Array, tuple[Array, ...]]:
        out, log_sums = (checkpoint_name(x, KEPT_ATTENTION) for x in forward(query, key, value))
        return out, (query, key, value, out, log_sums)

    def backward(kept: tuple[Array, ...], cotangent: Array) -> tuple[Array, Array, Array]:
        query, key, value, out, log_sums = kept
        dots = jnp.einsum("bnhd,bnhd->bhn", out, cotangent, precision="highest", preferred_element_type=jnp.float32)

        def add(sums: tuple[Array, ...], key: Array, value: Array, step: Array | int) -> tuple[Array, ...]:
            found = pieces.gradients(query, key, value, cotangent, log_sums, dots, length(step))
            return tuple(x + y.astype(jnp.float32) for x, y in zip(sums, found, strict=True))

        def turn(carry: tuple[Array, ...], step: Array) -> tuple[tuple[Array, ...], None]:
            key, value, *sums = carry
            following = rotated(key, value)
            d_query, *others = add(tuple(sums), key, value, step)
            return (*following, d_query, *rotated(*others)), None

        initial = [jnp.zeros(x.shape, jnp.float32) for x in (query, key, value)]
        (key, value, *sums), _ = jax.lax.scan(turn, (key, value, *initial), jnp.arange(ways - 1))
        d_query, *others = add(tuple(sums), key, value, ways - 1)
        d_key, d_value = rotated(*others)  # the last step takes them back to the device that owns the keys
        return d_query.astype(dtype), d_key.astype(dtype), d_value.astype(dtype)

    attend.defvjp(keep, backward)
    key, value = (_present_first(x, present) for x in (key, value))
    return attend(query, key, value)


def _present_first(x: Shaped[Array, "b m heads head_dim"], present: Present) -> Shaped[Array, "b m heads head_dim"]:
    """This device's keys in an order that puts padding last, since `Pieces` take a length."""
    order = np.argsort(~present, 1, kind="stable")
    if (order == np.arange(order.shape[1])).all():
        return x
    return jnp.take(x, jnp.asarray(order)[jax.lax.axis_index(CONTEXT)], 1, unique_indices=True, mode="clip")
