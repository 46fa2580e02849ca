"""Environment of other processes of a test: this checkout, and CPU devices that stand for those of a mesh."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[1]


def environment(devices: int = 1) -> dict[str, str]:
    """The test's own environment, with so many CPU devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}
