"""Programs of the sampler: jitted functions, compiled with the options of the device they run on."""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar

import jax

from helios_jax.compile import compiler_options

Function = TypeVar("Function", bound=Callable[..., Any])


def program(**options: Any) -> Callable[[Function], Function]:
    """A decorator: `jax.jit` with `options` and those of the device, which is asked for at the first call only."""

    def decorate(function: Function) -> Any:
        @cache
        def jitted() -> Any:
            return jax.jit(function, compiler_options=compiler_options() or None, **options)

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return jitted()(*args, **kwargs)

        return call

    return decorate
