"""Pixels of images and videos as the VAE takes them, by the functions that read a call's inputs."""

from typing import Any

import numpy as np

from helios_jax.sampling.context import frames_of, prepare_images, preprocess


def preprocess_image(image: Any, height: int, width: int) -> np.ndarray:
    return prepare_images(image, 1, height, width)[0]


def preprocess_video(video: Any, height: int, width: int, fps: float | None = None) -> np.ndarray:
    return preprocess(frames_of(video, fps, "video"), height, width, "video")
