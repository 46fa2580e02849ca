"""The process of sample.py and helios-sample: signals are handled before anything that takes time is imported."""

from collections.abc import Sequence

from helios_jax.runtime import interrupts
from helios_jax.runtime.command import program_name


def main(argv: Sequence[str] | None = None) -> int:
    """`cli.main`, imported when it is called."""
    from helios_jax.sampling import cli

    return cli.main(argv)


def entry_point() -> int:
    """`main` as a process of its own; returns the exit code."""
    interrupts.install(program_name("sample.py"))
    code = main()
    if code == interrupts.EXIT_CODE:
        interrupts.leave(code)
    return code
