"""Trains one stage: python train.py configs/toy/vae.yaml optim.lr=1e-3

Everything about the run is in its config; `key=value` arguments override it. A run that finds checkpoints in its folder
continues from the newest. `stage` names a stage of `helios_jax.training.stage_names`, or the dotted path of a class of
yours that derives from `helios_jax.training.stage.Stage`. `--help` lists stages, keys and exit codes.
"""

import sys

from helios_jax.training.cli import entry_point, main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(entry_point())
