"""Attention of every query to the first keys of its row."""

from pallas_kernels.attention.api import Implementation, attention, gradients, reference, unsupported, with_log_sums

__all__ = ["Implementation", "attention", "gradients", "reference", "unsupported", "with_log_sums"]
