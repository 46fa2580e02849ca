"""RMS norm across all heads, rotary position embedding, split into heads."""

from pallas_kernels.norm_rope.api import Rotary, from_kernels, norm_rope, reference, signed, unsupported

__all__ = ["Rotary", "from_kernels", "norm_rope", "reference", "signed", "unsupported"]
