"""Rematerialization policies: which activations of a block are kept for the backward pass, by name."""

from typing import Any, Literal

import jax

BLOCK_INPUT = "block_input"

# block: nothing but the block's input. offload: that, in the host's memory.
# dots_with_no_batch_dims_saveable: and the results of matrix products with weights.
# dots_saveable: and those of attention, as many as pairs of tokens.
Remat = Literal["block", "offload", "dots_with_no_batch_dims_saveable", "dots_saveable"]


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
    return getattr(policies, name)
