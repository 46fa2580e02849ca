"""Runs of sample.py with the tiny pipeline."""

import sample

# The settings of a short video; the model and the file are to be added.
CONFIG = """
prompt: a red plus
height: 32
width: 48
num_inference_steps: 2
num_latent_frames_per_chunk: 3
"""


def run(config, *arguments) -> int:
    """The exit code of a command line."""
    return sample.main([str(config), *map(str, arguments)])
