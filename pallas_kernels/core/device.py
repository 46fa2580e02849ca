"""The kind of device that kernels are being traced for."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax

_TARGET: ContextVar[Any] = ContextVar("target", default=None)


@contextmanager
def compiling_for(device: Any) -> Iterator[None]:
    """Context in which kernels are traced for `device` (a `jax.Device`, also of a topology) instead of jax's own
    devices.
    """
    token = _TARGET.set(device)
    try:
        yield
    finally:
        _TARGET.reset(token)


def _device() -> Any:
    return _TARGET.get() or jax.devices()[0]


def platform() -> str:
    """ "tpu", "gpu" or "cpu"."""
    name: str = _device().platform
    return "gpu" if name in ("cuda", "rocm") else name


def kind() -> str:
    """The name of the kind of device, such as "TPU v5" or "NVIDIA H100 80GB HBM3"."""
    return _device().device_kind
