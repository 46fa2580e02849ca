"""Mosaic GPU's interpreter, whose parameters are private in jax 0.10 and public from 0.11 on."""

try:
    from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams
except ImportError:
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

__all__ = ["InterpretGPUParams"]
