"""Layer norm with a shift and a scale chosen by each token's run."""

from pallas_kernels.adaln.api import adaln, by, layer_norm, reference, unsupported

__all__ = ["adaln", "by", "layer_norm", "reference", "unsupported"]
