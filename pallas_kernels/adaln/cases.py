"""Cases of adaln for `pallas_kernels.tools.check`."""

from collections.abc import Iterator

from pallas_kernels.adaln import api
from pallas_kernels.tools.case import DTYPES, EPS, Case, both


def cases() -> Iterator[Case]:
    """One token, lengths that no block divides, and 32760 tokens; in each dtype."""
    for dtype in DTYPES:
        for b, runs, d in ((1, (1,), 256), (2, (100, 233), 5120), (1, (9000, 23760), 1024)):
            yield Case(
                "adaln",
                f"{b} x {sum(runs)} tokens of {d}",
                dtype,
                *both(api.adaln, api.reference, runs, EPS),
                ((b, sum(runs), d),),
                ((b, len(runs), d),) * 2,
            )
