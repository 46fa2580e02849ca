"""The process of sample.py and helios-sample: signals are handled before anything that takes time is imported."""

from collections.abc import Sequence
from typing import NoReturn

from helios_jax.runtime import interrupts
from helios_jax.runtime.command import program_name


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `cli.main`, which is imported only now."""
    from helios_jax.sampling import cli

    return cli.main(argv)


def entry_point() -> NoReturn:
    """Runs `main` and ends the process at once: the interpreter's own shutdown takes a while and ignores signals."""
    interrupts.install(program_name("sample.py"))
    interrupts.leave(main())
