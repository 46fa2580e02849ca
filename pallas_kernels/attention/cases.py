"""Cases of attention for `pallas_kernels.tools.check`."""

from collections.abc import Iterator

import numpy as np

from pallas_kernels.attention import api
from pallas_kernels.tools.case import DTYPES, Case, both


def cases() -> Iterator[Case]:
    """One token, lengths that no block divides, and 32760 tokens; in each dtype."""
    for dtype in DTYPES:
        for b, n, m, heads, head_dim, lengths in (
            (1, 1, 9, 4, 64, None),
            (2, 333, 517, 4, 128, (400, 517)),
            (1, 11040, 11040, 4, 128, None),
            (1, 32760, 1000, 4, 64, None),
        ):
            yield Case(
                "attention",
                f"{b} x {n} queries, {m} keys, head_dim {head_dim}",
                dtype,
                *both(api.attention, api.reference, None if lengths is None else np.array(lengths)),
                tuple((b, length, heads, head_dim) for length in (n, m, m)),
                # Tensor cores truncate each sum of 16 products, so that float32's error grows with the length.
                allowed=max(DTYPES[dtype], 1e-8 * max(n, m)),
            )
