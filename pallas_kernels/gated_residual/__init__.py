"""A gated residual and the norm that follows it."""

from pallas_kernels.gated_residual.api import Sums, from_kernels, gated_residual, reference, unsupported

__all__ = ["Sums", "from_kernels", "gated_residual", "reference", "unsupported"]
