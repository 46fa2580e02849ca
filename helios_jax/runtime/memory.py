"""The share of a GPU's memory that programs may use, and errors of a device or a host that has none left."""

import os
from collections.abc import MutableMapping

# Of a GPU's memory; jax alone takes 0.75. The rest is for CUDA, its libraries and the buffers between GPUs.
GPU_SHARE = 0.95
# Settings of jax about it; XLA_PYTHON_CLIENT_MEM_FRACTION is an older name, and jax refuses both together.
GPU_SETTINGS = (
    "XLA_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_ALLOCATOR",
)
ON_CHIP = ("memory space vmem", "memory space smem")


def use_gpus_whole(environment: MutableMapping[str, str] = os.environ) -> None:
    """Lets jax take `GPU_SHARE` of each GPU, unless the environment says something about it already.

    To be called before anything asks for devices.
    """
    if not any(environment.get(name) for name in GPU_SETTINGS):
        environment[GPU_SETTINGS[0]] = str(GPU_SHARE)


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
