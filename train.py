"""Trains one stage: python train.py configs/toy/vae.yaml optim.lr=1e-3

Everything about the run is in its config; `key=value` arguments override it. A run that finds checkpoints in its folder
continues from the newest. `stage` names a stage of `helios_jax.training.stage_table`, or the dotted path of a class of
yours that derives from `helios_jax.training.stage.Stage`.

Exit code 0 when done or ended by SIGTERM (after saving), 130 by Ctrl-C (after saving), 1 when the loss stopped being
finite, 2 for input that cannot be used.
"""

import sys

from helios_jax.training.cli import main

if __name__ == "__main__":
    sys.exit(main())
