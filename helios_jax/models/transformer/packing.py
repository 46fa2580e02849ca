"""The layout of tokens: several sequences packed into one (NaViT, arXiv 2307.06304), and split over devices."""

from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from helios_jax.models.ops.attention import Segments
from pallas_kernels.core import device
from pallas_kernels.core.rows import Runs, spread


@dataclass(frozen=True)
class Packing:
    """Layout of several sequences in one: first each one's `history` tokens, then each one's `noisy` tokens.

    One sequence is the usual case; in training there are several, the levels of the pyramid. All history comes first,
    so that code for the history need not know of packing. A single sequence may end with `padding`: tokens that are
    computed like noisy ones, but that no token attends to.

    With `whole`, this is the layout of one device's share, one of `ways`. All shares have the same number of tokens of
    every part, so the last shares of a part may end with padding.
    """

    history: int
    noisy: tuple[int, ...]
    padding: int = 0
    ways: int = 1
    whole: "Packing | None" = None

    def __post_init__(self) -> None:
        if self.padding and len(self.noisy) > 1:
            raise ValueError(f"{len(self.noisy)} packed sequences cannot be padded by {self.padding} tokens, only one")

    def padded(self) -> "Packing":
        """Padded to the multiple of 8 tokens that products on a GPU need: XLA would pad, and copy, before each."""
        if device.platform() != "gpu" or len(self.noisy) > 1:
            return self
        return replace(self, padding=-self.num_tokens % 8)

    def shared(self, ways: int) -> "Packing":
        """The share of each of `ways` devices; on a GPU padded as by `padded`."""
        if ways == 1:
            return self.padded()
        share = Packing(-(-self.history // ways), tuple(-(-n // ways) for n in self.noisy), ways=ways, whole=self)
        extra = share.padded().padding
        return replace(share, noisy=(share.noisy[0] + extra, *share.noisy[1:]))

    @property
    def num_history(self) -> int:
        """History tokens of all sequences."""
        return self.history * len(self.noisy)

    @property
    def num_tokens(self) -> int:
        """History and noisy tokens of all sequences, without `padding`."""
        return self.num_history + sum(self.noisy)

    @property
    def parts(self) -> tuple[int, ...]:
        """Tokens of each sequence's history, then of each one's noisy part."""
        return (self.history,) * len(self.noisy) + self.noisy

    def present(self) -> Bool[np.ndarray, "ways tokens"] | None:
        """True for tokens of each device's share that are no padding; None where one device has all tokens."""
        if self.whole is None:
            return None
        first = [np.arange(self.ways)[:, None] * share + np.arange(share) for share in self.parts]
        return np.concatenate([at < size for at, size in zip(first, self.whole.parts)], 1)

    def laid_out(self, x: Float[Array, "b n d"]) -> Float[Array, "b n_out d"]:
        """Tokens of all parts in order, with padding; shares of devices one after the other."""
        if self.whole is None:
            return jnp.pad(x, ((0, 0), (0, self.padding), (0, 0)))
        parts = jnp.split(x, np.cumsum(self.whole.parts)[:-1], 1)
        shares = [
            jnp.pad(part, ((0, 0), (0, share * self.ways - part.shape[1]), (0, 0))).reshape(
                x.shape[0], self.ways, share, x.shape[2]
            )
            for part, share in zip(parts, self.parts)
        ]
        return jnp.concatenate(shares, 2).reshape(x.shape[0], -1, x.shape[2])

    def noisy_parts(self, x: Float[Array, "b n d"]) -> list[Float[Array, "b _n d"]]:
        """The noisy tokens of each sequence, without padding, from all shares of noisy tokens."""
        whole, ends = self.whole or self, np.cumsum(self.noisy)
        shares = jnp.split(x.reshape(x.shape[0], self.ways, -1, x.shape[2]), ends, 2)[: len(ends)]
        return [s.reshape(x.shape[0], -1, x.shape[2])[:, :n] for s, n in zip(shares, whole.noisy, strict=True)]

    def runs(self, rows: Float[Array, "b rows d"], *, history: bool = True) -> tuple[Float[Array, "b runs d"], Runs]:
        """The `rows` that tokens take, and how many tokens take each; without `history`, for noisy tokens only.

        The last rows belong to the noisy tokens, one to each sequence's. Before them come the history's rows: one for
        all copies of it, or one for each.
        """
        copies = rows.shape[1] - len(self.noisy)
        noisy = (*self.noisy[:-1], self.noisy[-1] + self.padding)
        if history and self.num_history:
            return rows, (self.num_history // copies,) * copies + noisy
        return rows[:, copies:], noisy

    def rows(self, rows: Float[Array, "b rows d"], *, history: bool = True) -> Float[Array, "b n d"]:
        """The row of each token, as `runs` assigns them; [b, 1, d] if it is the same for all tokens."""
        return spread(*self.runs(rows, history=history))

    def segments(self, *, history: bool) -> Segments | None:
        """The sequence of each query and of each key; without `history` the queries are the noisy tokens."""
        if len(self.noisy) == 1:
            return None
        numbers = np.arange(len(self.noisy))
        keys = np.concatenate([np.repeat(numbers, self.history), np.repeat(numbers, self.noisy)])
        return keys if history else keys[self.num_history :], keys
