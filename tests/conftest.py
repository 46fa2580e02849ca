"""Shape annotations are checked in every test; hypothesis does not time them, machines differ."""

from hypothesis import settings
from jaxtyping import install_import_hook

import tests.typecheck  # noqa: F401 (the hook looks it up by name)

install_import_hook(["helios_jax.models", "helios_jax.diffusion", "helios_jax.sampling"], "tests.typecheck.check")

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
