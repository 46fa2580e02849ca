"""Programs of the sampler: jitted functions, compiled with the options of the device they run on."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, wraps
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from helios_jax.compile import compiler_options, precise

Function = TypeVar("Function", bound=Callable[..., Any])


def program(**options: Any) -> Callable[[Function], Function]:
    """A decorator: `jax.jit` with `options` and those of the device, which is asked for at the first call only.

    Weights that are split over a mesh bring it along, as kernels ask which there is (`jax.set_mesh`). Where no array is
    of less than float32, products are not either (`compile.precise`).
    """

    def decorate(function: Function) -> Any:
        @cache
        def jitted() -> Any:
            return jax.jit(function, compiler_options=compiler_options() or None, **options)

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            mesh = _mesh((args, kwargs))
            with nullcontext() if mesh is None else jax.set_mesh(mesh), precise(_dtype((args, kwargs))):
                return jitted()(*args, **kwargs)

        return call

    return decorate


def _dtype(tree: Any) -> Any:
    """That of the first array of less than float32, which is what there is otherwise."""
    dtypes = (leaf.dtype for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array))
    return next((x for x in dtypes if jnp.issubdtype(x, jnp.floating) and x.itemsize < 4), jnp.float32)


def _mesh(tree: Any) -> Mesh | None:
    """That of the first array that lies on one."""
    shardings = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree))
    return next((s.mesh for s in shardings if isinstance(s, NamedSharding) and isinstance(s.mesh, Mesh)), None)
