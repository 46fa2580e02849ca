"""Attention of every query to the first keys of its row."""

from pallas_kernels.attention.api import attention, gradients, reference, unsupported, with_log_sums
from pallas_kernels.attention.residuals import KEPT_ATTENTION

__all__ = [
    "KEPT_ATTENTION",
    "attention",
    "gradients",
    "reference",
    "unsupported",
    "with_log_sums",
]
