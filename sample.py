"""Make a video: python sample.py configs/toy/sample.yaml --prompt "a red square moves right fast on a black background"

`python sample.py --help` lists every option; helios_jax/sampling/cli.py is the command.
"""

import sys

from helios_jax.sampling.entry import entry_point, main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(entry_point())
