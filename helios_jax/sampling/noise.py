"""Where random numbers come from: a seed, or an object that hands them out."""

import zlib
from collections import Counter
from typing import Protocol, runtime_checkable

import jax
import numpy as np
from numpy.typing import ArrayLike


@runtime_checkable
class Noise(Protocol):
    """Called on the host once for every random draw, in the order in which the diffusers pipelines draw.

    `site` names the purpose ("latents", ...); shapes are channels-last.
    """

    def normal(self, site: str, shape: tuple[int, ...]) -> ArrayLike: ...

    def uniform(self, site: str, shape: tuple[int, ...]) -> ArrayLike: ...


class SeededNoise:
    """Keys split from one seed by site and by how often the site was asked: more chunks never change earlier ones."""

    def __init__(self, seed: int):
        self._root = jax.random.key(seed)
        self._asked: Counter[str] = Counter()

    def _key(self, site: str) -> jax.Array:
        index = self._asked[site]
        self._asked[site] += 1
        return jax.random.fold_in(jax.random.fold_in(self._root, zlib.crc32(site.encode())), index)

    def normal(self, site: str, shape: tuple[int, ...]) -> jax.Array:
        return jax.random.normal(self._key(site), shape)

    def uniform(self, site: str, shape: tuple[int, ...]) -> jax.Array:
        return jax.random.uniform(self._key(site), shape)


def draw(values: ArrayLike, shape: tuple[int, ...], site: str) -> np.ndarray | jax.Array:
    """`values` as a float32 array, checked: a caller's object may hand out anything."""
    array = values if isinstance(values, jax.Array) else np.asarray(values, np.float32)
    if tuple(array.shape) != tuple(shape):
        raise ValueError(f"noise for {site!r} has shape {list(array.shape)}, not {list(shape)} as it was asked for")
    return array
