"""Shape annotations are checked in every test."""

from jaxtyping import install_import_hook

install_import_hook(["helios_jax.models", "helios_jax.diffusion", "helios_jax.sampling"], "beartype.beartype")
