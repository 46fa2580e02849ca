"""Several sequences in one (NaViT, arXiv 2307.06304): the levels of the pyramid in training."""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Array, Float

from helios_jax.models.ops.attention import Segments
from pallas_kernels.core import device
from pallas_kernels.core.rows import Runs, spread


@dataclass(frozen=True)
class Packing:
    """Layout of several sequences in one: first each one's `history` tokens, then each one's `noisy` tokens.

    One sequence is the usual case. All history comes first, so that what treats it apart need not know of packing.
    One sequence may have `padding` behind its noisy tokens: tokens that are computed like them, attended to by none.
    """

    history: int
    noisy: tuple[int, ...]
    padding: int = 0

    def __post_init__(self) -> None:
        if self.padding and len(self.noisy) > 1:
            raise ValueError(f"{len(self.noisy)} packed sequences cannot be padded by {self.padding} tokens, only one")

    def padded(self) -> "Packing":
        """Padded to the multiple of 8 tokens that products on a GPU need: XLA would pad, and copy, before each."""
        if device.platform() != "gpu" or len(self.noisy) > 1:
            return self
        return replace(self, padding=-self.num_tokens % 8)

    @property
    def num_history(self) -> int:
        """History tokens of all sequences."""
        return self.history * len(self.noisy)

    @property
    def num_tokens(self) -> int:
        """History and noisy tokens of all sequences, without the padding."""
        return self.num_history + sum(self.noisy)

    def runs(self, rows: Float[Array, "b rows d"], *, history: bool = True) -> tuple[Float[Array, "b runs d"], Runs]:
        """The `rows` that tokens take, and how many tokens take each; without `history` only for noisy tokens.

        The last rows are those of each sequence's noisy tokens; before them come the history's, one for all copies of
        it or one for each.
        """
        copies = rows.shape[1] - len(self.noisy)
        noisy = (*self.noisy[:-1], self.noisy[-1] + self.padding)
        if history and self.num_history:
            return rows, (self.num_history // copies,) * copies + noisy
        return rows[:, copies:], noisy

    def rows(self, rows: Float[Array, "b rows d"], *, history: bool = True) -> Float[Array, "b n d"]:
        """Each token's row of those of `runs`; what is the same for all tokens is [b, 1, d]."""
        return spread(*self.runs(rows, history=history))

    def segments(self, *, history: bool) -> Segments | None:
        """The sequence of each query and of each key; without `history` the queries are the noisy tokens."""
        if len(self.noisy) == 1:
            return None
        numbers = np.arange(len(self.noisy))
        keys = np.concatenate([np.repeat(numbers, self.history), np.repeat(numbers, self.noisy)])
        return keys if history else keys[self.num_history :], keys
