"""Compilation: a cache of compiled programs that lasts between runs."""

import os
from pathlib import Path

import jax


def enable_cache() -> None:
    """Keeps compiled programs in JAX_COMPILATION_CACHE_DIR, or in helios_jax/ of the user's cache folder."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(base / "helios_jax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
