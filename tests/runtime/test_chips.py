"""Peaks of devices by the names that jax gives them."""

from types import SimpleNamespace

import jax
import pytest

from helios_jax.runtime.chips import peak


def device(kind: str, cores: int = 1) -> SimpleNamespace:
    if kind.startswith("TPU"):
        return SimpleNamespace(platform="tpu", device_kind=kind, num_cores=cores)
    return SimpleNamespace(platform="gpu", device_kind=kind)


@pytest.mark.parametrize(
    ("kind", "cores", "tflops"),
    [
        ("TPU v4", 2, 275),
        ("TPU v4", 1, 137.5),  # a chip as two devices
        ("TPU v5 lite", 1, 197),
        ("TPU v5", 2, 459),
        ("TPU v6 lite", 1, 918),
        ("TPU7x", 1, 1153.5),  # half a chip
        ("NVIDIA A100-SXM4-80GB", 1, 312),
        ("NVIDIA H100 80GB HBM3", 1, 989),
        ("NVIDIA H100 PCIe", 1, 756.5),
        ("NVIDIA H200", 1, 989),
        ("NVIDIA B200", 1, 2250),
    ],
)
def test_known_devices(kind, cores, tflops):
    assert peak(device(kind, cores)) == tflops * 1e12


def test_others_have_none():
    assert peak(device("NVIDIA H100 80GB HBM3 MIG 1g.10gb")) is None
    assert peak(device("TPU v9", 2)) is None
    assert peak(jax.devices("cpu")[0]) is None
