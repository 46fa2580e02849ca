"""`python -m helios_jax.heliosbench`: a process of its own, which a signal ends at once. Files are whole or absent."""

from helios_jax.runtime import interrupts

if __name__ == "__main__":  # processes that measure import this file, too
    interrupts.install("heliosbench")
    from helios_jax.heliosbench.bench_cli import main

    interrupts.leave(main())
