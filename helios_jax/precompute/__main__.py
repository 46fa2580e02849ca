"""`python -m helios_jax.precompute`. Signals are handled before anything that takes time is imported."""

import sys

from helios_jax.runtime import interrupts

if __name__ == "__main__":
    interrupts.install("precompute")
    from helios_jax.precompute.cli import main

    sys.exit(main())
