"""Programs of the sampler: jitted functions, compiled with the options of the device they run on."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, wraps
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh, NamedSharding

from helios_jax.compile import compiler_options

Function = TypeVar("Function", bound=Callable[..., Any])


def program(**options: Any) -> Callable[[Function], Function]:
    """A decorator: `jax.jit` with `options` and those of the device, which is asked for at the first call only.

    Weights that are split over a mesh bring it along, as kernels ask which there is (`jax.set_mesh`).
    """

    def decorate(function: Function) -> Any:
        @cache
        def jitted() -> Any:
            return jax.jit(function, compiler_options=compiler_options() or None, **options)

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            mesh = _mesh((args, kwargs))
            with nullcontext() if mesh is None else jax.set_mesh(mesh):
                return jitted()(*args, **kwargs)

        return call

    return decorate


def _mesh(tree: Any) -> Mesh | None:
    """That of the first array that lies on one."""
    shardings = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree))
    return next((s.mesh for s in shardings if isinstance(s, NamedSharding) and isinstance(s.mesh, Mesh)), None)
