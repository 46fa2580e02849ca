"""The checkpoint name (`jax.ad_checkpoint`) of the outputs and log-sums that attention keeps for its gradients."""

KEPT_ATTENTION = "attention"
