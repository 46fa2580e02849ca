"""Helios, the 14B real-time long-video model (arXiv 2603.04379), in JAX.

Axis letters, the same in einops patterns, einsums and shape annotations throughout:

    b   batch                     t   frames (latent or pixel; the name beside it says which)
    h   height                    w   width
    c   channels                  n   tokens of a sequence
    d   features of a token       m   tokens of the text
    heads, head_dim               attention heads and the features of one

Video is `[b, t, h, w, c]`, tokens `[b, n, d]`, attention `[b, n, heads, head_dim]`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from helios_jax.sampling.options import PromptSwitch, SamplingOptions
    from helios_jax.sampling.pipeline import HeliosPipeline, HeliosPipelineOutput

__all__ = ["HeliosPipeline", "HeliosPipelineOutput", "PromptSwitch", "SamplingOptions"]


def __getattr__(name: str) -> Any:
    """Imports the pipeline when it is asked for: a config can then be checked without waiting for jax."""
    if name in __all__:
        module = "options" if name in ("SamplingOptions", "PromptSwitch") else "pipeline"
        return getattr(importlib.import_module(f"helios_jax.sampling.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
