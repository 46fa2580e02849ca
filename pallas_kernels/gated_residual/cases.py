"""Cases of gated_residual for `pallas_kernels.tools.check`."""

from collections.abc import Iterator

from pallas_kernels.gated_residual import api
from pallas_kernels.tools.case import DTYPES, EPS, Case, both


def cases() -> Iterator[Case]:
    """One token, lengths that no block divides, and 32760 tokens; in each dtype."""
    for dtype in DTYPES:
        for b, first, runs, d in ((1, 0, (1,), 256), (2, 96, (100, 233), 5120), (1, 8192, (24568,), 1024)):
            yield Case(
                "gated_residual",
                f"{b} x {sum(runs)} tokens of {d}",
                dtype,
                *both(api.gated_residual, api.reference, runs, EPS),
                ((b, first + sum(runs), d),) * 2,
                ((b, len(runs), d),) * 3,
            )
