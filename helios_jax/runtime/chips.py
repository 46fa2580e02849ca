"""Chips: memory, rates and links with their sources, and the peak rate of a `jax.Device`."""

from dataclasses import dataclass
from typing import Any

from helios_jax.runtime.memory import GPU_SHARE


@dataclass(frozen=True)
class Chip:
    """One device. Rates are per second; `link` is the bytes that one of its links carries in one direction.

    `efficiency` has the shares of these rates that programs reach in products, attention and memory-bound operations.
    `planner.cost` uses them for its expected time, not for its bound.
    """

    name: str
    memory: float  # bytes that programs may use
    flops: float  # of bfloat16 products
    bandwidth: float  # of the main memory
    link: float
    network: float  # bytes a second to other slices or hosts, for each device
    host: int  # devices of a host
    efficiency: tuple[float, float, float]
    source: str
    cores: int = 1  # cores of a chip, where names of machines count cores
    sides: int = 0  # dimensions of the grid of links; 0: a switch joins all devices of a host
    wraps: int = 0  # length from which a side of the grid is closed to a ring
    clock: float = 0.0  # cycles a second, for the compiler's own estimates


# TPU: the shares in products and in memory-bound operations follow from libtpu 0.0.42.1's own estimates for stage 1 on
# v5p, compiled with all effort, summed over the step; the share in splash attention is an assumption. H100 and H200:
# measured (docs/results/gpu.md).
_TPU, _GPU = (0.82, 0.6, 0.32), (0.71, 0.62, 0.8)
_CLOUD = "cloud.google.com/tpu/docs"
CHIPS = {
    "v5e": Chip(
        "TPU v5e", 15.75 * 2**30, 197e12, 819e9, 50e9, 3.1e9, 4, _TPU,
        f"{_CLOUD}/v5e (197 TFLOP/s, 819 GB/s, 400 GB/s both ways over 4 links, 6.4 Tbit/s a pod of 256); memory that "
        "libtpu leaves to programs: 15.75 of 16 GiB",
        sides=2, wraps=16, clock=1.5e9,
    ),
    "v5p": Chip(
        "TPU v5p", 95.74 * 2**30, 459e12, 2765e9, 100e9, 6.2e9, 4, _TPU,
        f"{_CLOUD}/v5p (459 TFLOP/s, 2765 GB/s, 4800 Gbit/s over 6 links); assumed: 200 Gbit/s a host of 4; memory "
        "that libtpu leaves to programs: 95.74 of 96 GiB",
        cores=2, sides=3, wraps=4, clock=1.75e9,
    ),
    "v6e": Chip(
        "TPU v6e", 31.25 * 2**30, 918e12, 1638e9, 100e9, 12.5e9, 4, _TPU,
        f"{_CLOUD}/v6e (918 TFLOP/s, 1638 GB/s, 800 GB/s both ways over 4 links, 25.6 Tbit/s a pod of 256); memory "
        "that libtpu leaves to programs: 31.25 of 32 GiB",
        sides=2, wraps=16, clock=1.75e9,
    ),
    "H100": Chip(
        "H100 SXM", GPU_SHARE * 84929347584, 989e12, 3352e9, 450e9, 50e9, 8, _GPU,
        "NVIDIA's H100 data sheet (989 TFLOP/s dense, 3.35 TB/s, NVLink 900 GB/s both ways); assumed: 400 Gbit/s of "
        f"InfiniBand a GPU; memory that programs may use: {GPU_SHARE:.0%} of the 84.9 GB that its driver has",
    ),
    "H200": Chip(
        "H200 SXM", GPU_SHARE * 150754820096, 989e12, 4800e9, 450e9, 50e9, 8, _GPU,
        "NVIDIA's H200 data sheet (989 TFLOP/s dense, 4.8 TB/s, NVLink 900 GB/s both ways); assumed: 400 Gbit/s of "
        f"InfiniBand a GPU; memory that programs may use: {GPU_SHARE:.0%} of the 150.8 GB that its driver has",
    ),
}  # fmt: skip

# Operations a second in products of bfloat16 by `device_kind`, as jax and NVIDIA's driver write it; for TPUs, of
# one TensorCore. From Google's pages and NVIDIA's data sheets, without sparsity. Parts of a GPU (MIG) have other names.
_V4, _V5P, _V7 = 275e12 / 2, CHIPS["v5p"].flops / 2, 2307e12 / 2
_A100, _HOPPER, _NVL = 312e12, CHIPS["H100"].flops, 835.5e12
PEAKS = {
    "TPU v4": _V4,
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5e": CHIPS["v5e"].flops,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": CHIPS["v6e"].flops,
    "TPU v6e": CHIPS["v6e"].flops,
    "TPU7x": _V7,
    "NVIDIA A100-SXM4-40GB": _A100,
    "NVIDIA A100-SXM4-80GB": _A100,
    "NVIDIA A100-PCIE-40GB": _A100,
    "NVIDIA A100 80GB PCIe": _A100,
    "NVIDIA H100 80GB HBM3": _HOPPER,
    "NVIDIA H100 PCIe": 756.5e12,
    "NVIDIA H100 NVL": _NVL,
    "NVIDIA H200": _HOPPER,
    "NVIDIA H200 NVL": _NVL,
    "NVIDIA GH200 480GB": _HOPPER,
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
}


def peak(device: Any) -> float | None:
    """Operations a second of a `jax.Device` in products of bfloat16; None for an unknown kind, such as a CPU.

    A TPU device is one TensorCore or, on v4 and v5p, usually both cores of a chip.
    """
    one = PEAKS.get(device.device_kind)
    return None if one is None else one * (device.num_cores if device.platform == "tpu" else 1)
