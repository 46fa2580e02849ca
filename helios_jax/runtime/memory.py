"""Errors of a device or a host that has no memory left."""

ON_CHIP = ("memory space vmem", "memory space smem")


def is_kernel_too_large(error: BaseException) -> bool:
    """True for the compiler's error about a kernel whose blocks need more on-chip memory than a TPU has."""
    return any(name in str(error) for name in ON_CHIP)


def is_out_of_memory(error: BaseException) -> bool:
    """True for out-of-memory errors of XLA's allocators and compiler, of Python and of numpy. Needs no jax.

    A kernel that needs more on-chip memory than a TPU has does not count: a smaller step would not help.
    """
    if isinstance(error, MemoryError):
        return True
    text = str(error)
    ours = type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and "RESOURCE_EXHAUSTED" in text
    return ours and not is_kernel_too_large(error)
