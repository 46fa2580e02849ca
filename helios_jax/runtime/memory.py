"""Errors of a device or a host that has no memory left."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tells the errors of XLA's allocators and compiler, and Python's and numpy's own. Needs no jax."""
    ours = isinstance(error, MemoryError)
    return ours or (
        type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and "RESOURCE_EXHAUSTED" in str(error)
    )
