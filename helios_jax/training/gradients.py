"""Addition of precomputed gradients to the gradients of the backward pass."""

from typing import Any

import jax


@jax.custom_vjp
def with_gradient(value: jax.Array, x: Any, gradient: Any) -> jax.Array:
    """Returns `value`; its gradient with respect to the tree `x` has `gradient` added to it.

    The backward pass begins with the last operation. Where that is this one, it adds all other gradients to `gradient`
    as they are computed, so that a complete second set of gradients is never in memory.
    """
    return value


def _forward(value: jax.Array, x: Any, gradient: Any) -> tuple[jax.Array, Any]:
    return value, gradient


def _backward(gradient: Any, seed: jax.Array) -> tuple[jax.Array, Any, None]:
    return seed, jax.tree.map(lambda g: seed.astype(g.dtype) * g, gradient), None


with_gradient.defvjp(_forward, _backward)
