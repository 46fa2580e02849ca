"""Cases of norm_rope for `pallas_kernels.tools.check`."""

from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp

from pallas_kernels.norm_rope import api
from pallas_kernels.tools.case import DTYPES, EPS, Case, both


def cases() -> Iterator[Case]:
    """One token, lengths that no block divides, and 32760 tokens; in each dtype."""
    for dtype in DTYPES:
        for b, n, heads, head_dim, history in ((1, 1, 4, 64, 0), (2, 333, 40, 128, 100), (1, 32760, 8, 64, 9000)):
            yield Case(
                "norm_rope",
                f"{b} x {n} tokens, {heads} heads of {head_dim}",
                dtype,
                *both(_turned(api.norm_rope), _turned(api.reference), heads, history),
                ((b, n, heads * head_dim),),
                ((heads * head_dim,), (heads,), (b, n, head_dim // 2)),
            )


def _turned(op: Callable[..., Any]) -> Callable[..., Any]:
    """`op` with its arrays first, the angles among them."""

    def run(x, weight, scale, angles, heads, history, **options):
        return op(x, weight, heads, EPS, (jnp.cos(angles), jnp.sin(angles)), scale, history, **options)

    return run
