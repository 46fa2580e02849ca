"""The process of sample.py and helios-sample: signals are handled before anything that takes time is imported."""

from collections.abc import Sequence
from typing import NoReturn

from helios_jax.runtime import interrupts
from helios_jax.runtime.command import program_name


def main(argv: Sequence[str] | None = None) -> int:
    """`cli.main`, imported when it is called."""
    from helios_jax.sampling import cli

    return cli.main(argv)


def entry_point() -> NoReturn:
    """`main` as a process of its own, which it ends: the interpreter's own end takes a while, and answers no signal."""
    interrupts.install(program_name("sample.py"))
    interrupts.leave(main())
