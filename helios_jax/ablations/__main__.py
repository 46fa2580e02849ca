"""The command `python -m helios_jax.ablations`."""

from helios_jax.runtime import interrupts

PROG = "python -m helios_jax.ablations"

if __name__ == "__main__":
    interrupts.install(PROG)  # before anything that takes time to import
    from helios_jax.ablations.command import main

    interrupts.leave(main())
