"""A clip of the toy and its file, for the tests of videos."""

import numpy as np

from helios_jax.media.mp4 import VideoWriter
from helios_jax.toy import world as toy

FRAMES = toy.render(toy.sample_scene(1, "train"), 33)


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2))


def write(path, frames=FRAMES, fps=24):
    with VideoWriter(path, fps, *frames.shape[1:3]) as video:
        video.write(frames)
    return path
