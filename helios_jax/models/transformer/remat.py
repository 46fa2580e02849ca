"""Rematerialization policies: which activations of a block are kept for the backward pass, by name."""

from typing import Any, Literal

import jax

from helios_jax.models.layers import LINEAR
from pallas_kernels.attention import KEPT_ATTENTION

BLOCK_INPUT = "block_input"

# block: nothing but the block's input. offload: that, in the host's memory.
# attention: and what kernels of attention need to go back, their outputs and log-sums; XLA's attention, which has no
# log-sums, is computed again.
# products: and the outputs of linear layers, each with what its adapters add: what is left to compute again is cheap.
# dots_with_no_batch_dims_saveable: the results of all matrix products with weights, those of adapters on their own.
# dots_saveable: and those of attention, as many as pairs of tokens where XLA computes it.
Remat = Literal["block", "offload", "attention", "products", "dots_with_no_batch_dims_saveable", "dots_saveable"]

# cuDNN's attention, whose outputs and log-sums have no names.
_CUDNN = "dot_product_attention_fwd_wrapper"


def policy(name: Remat) -> Any:
    """The policy for `jax.checkpoint`."""
    policies = jax.checkpoint_policies
    if name == "block":
        return policies.nothing_saveable
    if name == "offload":
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[BLOCK_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        )
    if name in ("attention", "products"):
        names = (KEPT_ATTENTION, LINEAR) if name == "products" else (KEPT_ATTENTION,)
        named = policies.save_only_these_names(*names)
        return lambda primitive, *args, **more: primitive.name == _CUDNN or named(primitive, *args, **more)
    return getattr(policies, name)
