"""Kernels as they are interpreted, with their gradients.

The parameters of Mosaic GPU's interpreter are private in jax 0.10 and public from 0.11 on.
"""

import jax

try:
    from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams
except ImportError:
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

__all__ = ["InterpretGPUParams", "compiled_vjp", "vjp"]


def vjp(function, inputs, cotangents):
    """The outputs of `function`, and the gradient of each input at these cotangents of the outputs."""
    outputs, backward = jax.vjp(function, *inputs)
    return outputs, backward(jax.tree.map(lambda x, out: x.astype(out.dtype), cotangents, outputs))


# In one program: op by op takes longer to compile. Not for Mosaic GPU's interpreter: what it calls back needs a thread
# of those that can all be waiting for it.
compiled_vjp = jax.jit(vjp, static_argnums=0)
