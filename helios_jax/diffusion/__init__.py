"""Diffusion as pure functions over named pytrees, around the networks."""
