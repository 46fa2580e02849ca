"""Attention of every query to the first keys of its row."""

from pallas_kernels.attention.api import Implementation, attention, reference, unsupported

__all__ = ["Implementation", "attention", "reference", "unsupported"]
