"""Rematerialization policies: which activations of a block are kept for the backward pass, by name."""

from typing import Any, Literal

import jax

from helios_jax.models.layers import INNER, LINEAR
from pallas_kernels.attention import KEPT_ATTENTION

BLOCK_INPUT = "block_input"

# block: keeps only the block's input. offload: keeps it in host memory.
# attention: also keeps the outputs and log-sums of attention kernels, for their gradients. XLA's attention has no
# log-sums and is computed again.
# products: also keeps the outputs of linear layers, with what their adapters add. The rest is cheap to compute again.
# some_products: as products, without queries, keys and the features within a feed-forward. Half of the memory is saved,
# and three fifths of the products are not computed again.
# dots_with_no_batch_dims_saveable: keeps the results of all products with weights, those of adapters separately.
# dots_saveable: also keeps the results of attention's products; by XLA, they have a value for each pair of tokens.
Remat = Literal[
    "block", "offload", "attention", "some_products", "products", "dots_with_no_batch_dims_saveable", "dots_saveable"
]

_KEPT: dict[Remat, tuple[str, ...]] = {
    "attention": (KEPT_ATTENTION,),
    "some_products": (KEPT_ATTENTION, LINEAR),
    "products": (KEPT_ATTENTION, LINEAR, INNER),
}

# The primitive of cuDNN's attention. Its outputs and log-sums have no checkpoint names, so it is told by its own.
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
    if name in _KEPT:
        named = policies.save_only_these_names(*_KEPT[name])
        return lambda primitive, *args, **more: primitive.name == _CUDNN or named(primitive, *args, **more)
    return getattr(policies, name)
