"""Layer norm with a shift and a scale chosen by each token's run."""

from pallas_kernels.adaln.api import adaln, from_kernels, layer_norm, reference, unsupported

__all__ = ["adaln", "from_kernels", "layer_norm", "reference", "unsupported"]
