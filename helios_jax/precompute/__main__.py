"""`python -m helios_jax.precompute`."""

import sys

from helios_jax.precompute.cli import main

sys.exit(main())
