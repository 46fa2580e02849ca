"""The name of what attention's kernels keep for their gradients: outputs and log-sums (`jax.ad_checkpoint`)."""

KEPT_ATTENTION = "attention"
