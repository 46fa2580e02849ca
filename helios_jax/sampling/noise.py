"""Sources of random numbers: seeds, or an object that hands them out."""

import zlib
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from helios_jax.runtime import seeds


@runtime_checkable
class Noise(Protocol):
    """Called on the host once for every random draw, in the order in which the diffusers pipelines draw.

    `site` names the purpose ("latents", ...); shapes are channels-last.
    """

    def normal(self, site: str, shape: tuple[int, ...]) -> ArrayLike: ...

    def uniform(self, site: str, shape: tuple[int, ...]) -> ArrayLike: ...


class SeededNoise:
    """Random numbers from seeds. The key of a draw depends on its site and on the number of draws made there before.
    So more chunks never change earlier ones.

    With several seeds the first dimension is the batch and each seed draws one row of it, so a video is the same alone
    and in a batch; a draw that all videos share, with another first dimension, comes from the first seed.
    """

    def __init__(self, *numbers: int, asked: Mapping[str, int] | None = None):
        self.seeds = tuple(seeds.check_seed(number) for number in numbers)
        self._roots = [seeds.key(seed) for seed in self.seeds]
        self._asked: Counter[str] = Counter(asked)

    def asked(self) -> dict[str, int]:
        """Number of draws at each site; `SeededNoise(*seeds, asked=...)` continues after them."""
        return dict(self._asked)

    def _draw(self, kind, site: str, shape: tuple[int, ...]) -> jax.Array:
        index = self._asked[site]
        self._asked[site] += 1
        number: Any = np.array([zlib.crc32(site.encode()), index], np.uint32)
        if len(self._roots) == 1 or shape[0] != len(self._roots):
            return _drawn(kind, shape, self._roots[0], number)
        return jnp.concatenate([_drawn(kind, (1, *shape[1:]), root, number) for root in self._roots])

    def normal(self, site: str, shape: tuple[int, ...]) -> jax.Array:
        return self._draw(jax.random.normal, site, shape)

    def uniform(self, site: str, shape: tuple[int, ...]) -> jax.Array:
        return self._draw(jax.random.uniform, site, shape)


@partial(jax.jit, static_argnums=(0, 1))
def _drawn(kind: Any, shape: tuple[int, ...], root: jax.Array, number: jax.Array) -> jax.Array:
    """One draw of `kind`, in one program."""
    return kind(jax.random.fold_in(jax.random.fold_in(root, number[0]), number[1]), shape)


def draw(values: ArrayLike, shape: tuple[int, ...], site: str) -> np.ndarray | jax.Array:
    """`values` as an array, float32 unless it is jax's. Raises ValueError for another shape than was asked for."""
    array = values if isinstance(values, jax.Array) else np.asarray(values, np.float32)
    if tuple(array.shape) != tuple(shape):
        raise ValueError(f"noise for {site!r} has shape {list(array.shape)}, not {list(shape)} as it was asked for")
    return array
