"""The choice between a kernel and XLA."""

from typing import Literal

from pallas_kernels.core import device

Implementation = Literal["xla", "pallas"]
HOPPER = ("H100", "H200", "H800", "H20", "GH200")  # parts of the names of its GPUs


def no_kernels(op: str) -> str | None:
    """The reason why no kernel of `op` can run on this kind of device, or None."""
    platform = device.platform()
    if platform not in ("tpu", "gpu"):
        return f"Pallas {op} has kernels for TPUs and NVIDIA GPUs (Hopper), and this runs on {platform}"
    if platform == "gpu" and not any(name in device.kind() for name in HOPPER):
        return f"Pallas {op}'s GPU kernel is written for Hopper (H100, H200), and this is a {device.kind()}"
    return None


def by_kernel(asked: Implementation | None, reason: str | None, *, default: bool) -> bool:
    """True if the kernel runs: it is asked for, or it is the `default`, nothing is asked for and there is no `reason`.

    Raises ValueError if it is asked for and cannot run.
    """
    if asked == "pallas" and reason:
        raise ValueError(f"{reason}: implementation='xla' runs everywhere")
    return asked == "pallas" or (asked is None and default and reason is None)
