"""The Helios transformer and the inputs it takes."""

from helios_jax.models.transformer.block import Block, TransformerConfig, check_implementations
from helios_jax.models.transformer.history import MEMORY_PATCHES, SCALES, FrameIndices, HistoryLatents
from helios_jax.models.transformer.model import TextCache, Transformer, init_memory_patches

__all__ = [
    "MEMORY_PATCHES",
    "SCALES",
    "Block",
    "FrameIndices",
    "HistoryLatents",
    "TextCache",
    "Transformer",
    "TransformerConfig",
    "check_implementations",
    "init_memory_patches",
]
