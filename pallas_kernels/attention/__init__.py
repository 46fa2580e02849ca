"""Attention of every query to the first keys of its row."""

from pallas_kernels.attention.api import Implementation, attention, reference, unsupported
from pallas_kernels.attention.residuals import KEPT_ATTENTION

__all__ = ["KEPT_ATTENTION", "Implementation", "attention", "reference", "unsupported"]
