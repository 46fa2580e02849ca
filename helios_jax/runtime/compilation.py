"""Compilation: a cache that lasts between runs, compiler options, and the precision that programs compute in."""

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp

from helios_jax.locations import check_locations, user_cache

# cuDNN convolves channels-last without transposes, and cublasLt adds bias and GELU to a product itself, which Triton's
# products would leave to another kernel.
GPU_OPTIONS = {"xla_gpu_force_conv_nhwc": True, "xla_gpu_enable_triton_gemm": False}


def enable_cache(shared: str | os.PathLike | None = None) -> None:
    """Keeps compiled programs in JAX_COMPILATION_CACHE_DIR, in `shared`, or in helios_jax/ of the user's cache folder.

    Of several hosts the first alone writes, so that they need a folder that all see: `shared`. Raises LocationError for
    a folder name that cannot be used. A program is kept if it took half a second to compile, or as many seconds as
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS says.
    """
    named = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if named:
        check_locations(JAX_COMPILATION_CACHE_DIR=named)
    elif named is None:
        jax.config.update("jax_compilation_cache_dir", os.fspath(shared or user_cache() / "xla"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def compiler_options(platform: str | None = None) -> dict[str, Any]:
    """Options for `jax.jit(..., compiler_options=)` on `platform`: "gpu", "tpu" or "cpu"; None is where jax runs."""
    platform = platform or jax.default_backend()
    return dict(GPU_OPTIONS) if platform in ("gpu", "cuda") else {}


def compute_dtype(dtype: Any = None) -> Any:
    """The `dtype` asked for, or this device's: float32 on CPU, bfloat16 elsewhere."""
    return jnp.dtype(dtype or (jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16))


def precise(dtype: Any) -> AbstractContextManager[Any]:
    """Makes programs traced under it multiply in `dtype`: by default GPUs and TPUs round float32 to 10 or 8 bits."""
    exact = jnp.dtype(dtype) == jnp.float32
    return jax.default_matmul_precision("highest") if exact else nullcontext()
