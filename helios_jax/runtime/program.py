"""Programs of the sampler: jitted functions of a model, compiled with the options of the device they run on."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache, update_wrapper, wraps
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from helios_jax.runtime.compilation import compiler_options, precise

Model = TypeVar("Model")
P = ParamSpec("P")
Result = TypeVar("Result")
_listeners: list[Callable[[], None]] = []


@contextmanager
def before_compiling(tell: Callable[[], None]) -> Iterator[None]:
    """Calls `tell` whenever a program is about to be compiled, which may take minutes."""
    _listeners.append(tell)
    try:
        yield
    finally:
        _listeners.remove(tell)


class Program(Generic[Model, P, Result]):
    """`function` under `jax.jit` with `options` and the device's own, which are looked up at the first call.

    The mesh that a model is split over is set for the call, since kernels read it (`jax.set_mesh`). For a model in
    float32, products are computed in float32, too (`compilation.precise`).
    """

    def __init__(self, function: Callable[Concatenate[Model, P], Result], options: dict[str, Any]):
        update_wrapper(self, function)

        # One for each tree structure: jit would compare a large model's structure with the known ones at every call.
        @cache
        def jitted(structure: Any) -> Any:
            @wraps(function)  # `options` name arguments
            def flat(leaves: Any, *args: P.args, **kwargs: P.kwargs) -> Result:
                for tell in _listeners:  # jit runs this body only to trace it, for the compiler
                    tell()
                return function(jax.tree.unflatten(structure, leaves), *args, **kwargs)

            return jax.jit(flat, compiler_options=compiler_options() or None, **options)

        self._jitted = jitted

    def __call__(self, model: Model, *args: P.args, **kwargs: P.kwargs) -> Result:
        return self.bind(model)(*args, **kwargs)

    def bind(self, model: Model) -> Callable[P, Result]:
        """The program of `model` as it is now, for many calls: a large tree is flattened once, which takes a while."""
        leaves, structure = jax.tree.flatten(model)
        jitted, mesh, dtype = self._jitted(structure), _mesh(leaves), _dtype(leaves)

        def call(*args: P.args, **kwargs: P.kwargs) -> Result:
            with nullcontext() if mesh is None else jax.set_mesh(mesh), precise(dtype):
                return jitted(leaves, *args, **kwargs)

        return call


def program(
    **options: Any,
) -> Callable[[Callable[Concatenate[Model, P], Result]], Program[Model, P, Result]]:
    """A decorator that makes a `Program`; `options` go to `jax.jit`."""
    return lambda function: Program(function, options)


def _dtype(leaves: Sequence[Any]) -> Any:
    """Dtype of the first array below float32, else float32."""
    dtypes = (leaf.dtype for leaf in leaves if isinstance(leaf, jax.Array))
    return next((x for x in dtypes if jnp.issubdtype(x, jnp.floating) and x.itemsize < 4), jnp.float32)


def _mesh(leaves: Sequence[Any]) -> Mesh | None:
    """Mesh of the first array that lies on one, else None."""
    shardings = (getattr(leaf, "sharding", None) for leaf in leaves)
    return next((s.mesh for s in shardings if isinstance(s, NamedSharding) and isinstance(s.mesh, Mesh)), None)
