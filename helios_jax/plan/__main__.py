"""`python -m helios_jax.plan`."""

import sys

from helios_jax.planner.command import main

sys.exit(main())
