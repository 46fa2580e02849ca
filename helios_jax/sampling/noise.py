"""Sources of random numbers: seeds, or an object that hands them out."""

import zlib
from collections import Counter
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
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
    """Keys split from a seed by site and by how often the site was asked: more chunks never change earlier ones.

    With several seeds the first dimension is the batch and each seed draws one row of it, so a video is the same alone
    and in a batch; a draw that all videos share, with another first dimension, comes from the first seed.
    """

    def __init__(self, *seeds: int, asked: Mapping[str, int] | None = None):
        self.seeds = seeds
        self._roots = [jax.random.key(seed) for seed in seeds]
        self._asked: Counter[str] = Counter(asked)

    def asked(self) -> dict[str, int]:
        """Number of draws at each site: `SeededNoise(*seeds, asked=...)` goes on from there."""
        return dict(self._asked)

    def _draw(self, kind, site: str, shape: tuple[int, ...]) -> jax.Array:
        index = self._asked[site]
        self._asked[site] += 1
        keys = [jax.random.fold_in(jax.random.fold_in(root, zlib.crc32(site.encode())), index) for root in self._roots]
        if len(keys) == 1 or shape[0] != len(keys):
            return kind(keys[0], shape)
        return jnp.concatenate([kind(key, (1, *shape[1:])) for key in keys])

    def normal(self, site: str, shape: tuple[int, ...]) -> jax.Array:
        return self._draw(jax.random.normal, site, shape)

    def uniform(self, site: str, shape: tuple[int, ...]) -> jax.Array:
        return self._draw(jax.random.uniform, site, shape)


def draw(values: ArrayLike, shape: tuple[int, ...], site: str) -> np.ndarray | jax.Array:
    """`values` as a float32 array, checked: a caller's object may hand out anything."""
    array = values if isinstance(values, jax.Array) else np.asarray(values, np.float32)
    if tuple(array.shape) != tuple(shape):
        raise ValueError(f"noise for {site!r} has shape {list(array.shape)}, not {list(shape)} as it was asked for")
    return array
