"""Gradients that are known before the backward pass reaches them."""

from typing import Any

import jax


@jax.custom_vjp
def with_gradient(value: jax.Array, x: Any, gradient: Any) -> jax.Array:
    """`value`, with `gradient` as its gradient at `x`.

    The backward pass of a sum begins with its last term. A `gradient` there is what all others are added to, so that no
    second copy of them is ever whole.
    """
    return value


def _forward(value: jax.Array, x: Any, gradient: Any) -> tuple[jax.Array, Any]:
    return value, gradient


def _backward(gradient: Any, seed: jax.Array) -> tuple[jax.Array, Any, None]:
    return seed, jax.tree.map(lambda g: seed.astype(g.dtype) * g, gradient), None


with_gradient.defvjp(_forward, _backward)
