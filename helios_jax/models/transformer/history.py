"""The parts of the history: their scales, relative to the patch embedding, and the inputs that hold their frames.

`SCALES` is the one table of how the past is compressed. The patch embeddings, the rotary positions, the counts of
tokens and the layout of checkpoints follow from it; `diffusion/memory.py` says which frames each part gets. A new part
is a row of the table and a field of the two classes below it.
"""

import math
from collections.abc import Mapping
from typing import Any

from flax import struct

Scale = tuple[int, int, int]  # patches of the patch embedding's size that a token stands for, in time, height and width

# From near to far; tokens go the other way round.
SCALES: dict[str, Scale] = {"short": (1, 1, 1), "mid": (2, 2, 2), "long": (4, 4, 4)}
# The same scales, by the names of the parts' patch embeddings.
MEMORY_PATCHES = {f"patch_{part}": scale for part, scale in SCALES.items()}


# The fields of the next two are not annotated with shapes: jax also puts objects that are no arrays into pytrees.
@struct.dataclass
class HistoryLatents:
    """Clean latents that condition the noisy ones, [b, t, h, w, c] at full resolution; None where a part is absent."""

    short: Any = None
    mid: Any = None
    long: Any = None


@struct.dataclass
class FrameIndices:
    """Temporal positions of every part's frames, int [b, t], or [1, t] when all samples share them."""

    noisy: Any
    short: Any = None
    mid: Any = None
    long: Any = None


def kernel(patch: tuple[int, ...], scale: Scale) -> tuple[int, ...]:
    """Size of the patches of a part, in latents."""
    return tuple(p * s for p, s in zip(patch, scale, strict=True))


def num_tokens(frames: Mapping[str, int], height: int, width: int, patch: tuple[int, ...]) -> int:
    """History tokens of a window that gives each part so many frames; sizes are the latents'."""
    return sum(
        math.prod(-(-size // k) for size, k in zip((n, height, width), kernel(patch, SCALES[part])))
        for part, n in frames.items()
    )
