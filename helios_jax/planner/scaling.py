"""A plot of predicted scaling: tokens a second and MFU of a config from 8 to 512 chips, by the planner's estimates.

    python -m helios_jax.planner.scaling configs/stage1_init.yaml --out docs/results/scaling.png

For each number of chips it takes the fastest settings that fit. Needs matplotlib (the `test` extra) and no compiler.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt

from helios_jax.config import ConfigError
from helios_jax.planner import analytic, program, search
from helios_jax.planner.analytic import Work
from helios_jax.planner.machines import Machine, machine
from helios_jax.runtime.command import Parser

CHIPS = (8, 16, 32, 64, 128, 256, 512)
NAMES = {
    "TPU v5p": lambda chips: f"v5p-{2 * chips}",
    "TPU v6e": lambda chips: f"v6e-{chips}" if chips <= 256 else f"{chips // 256}*v6e-256",
    "H100": lambda chips: f"H100x{chips}",
}


@dataclasses.dataclass(frozen=True)
class Point:
    """The best settings of one machine: None where none fit."""

    machine: Machine
    batch: int
    settings: str | None
    tokens: float = 0.0
    mfu: float = 0.0


def point(work: Work, name: str) -> Point:
    """The point of a machine, its batch as large as the config's, or one sample a chip where that is more."""
    rented = machine(name)
    batch = max(work.config.data.batch_size, rented.count)
    work = dataclasses.replace(work, config=program.with_settings(work.config, batch_size=batch))
    best = search.search(work, rented)[0]
    if not best.fits(rented):
        return Point(rented, batch, None)
    seconds = best.cost.seconds
    tokens, share = analytic.tokens_a_second(work, seconds), analytic.mfu(work, rented, seconds)
    return Point(rented, batch, best.overrides, tokens, share)


def draw(title: str, curves: dict[str, list[Point]], batch: int, out: Path) -> None:
    """Writes the plot: speed on the left, MFU on the right, and the assumptions below."""
    figure, (speed, share) = plt.subplots(1, 2, figsize=(11, 5.2))
    for name, points in curves.items():
        found = [one for one in points if one.settings]
        chips = [one.machine.count for one in found]
        (line,) = speed.plot(chips, [one.tokens for one in found], marker="o", label=name)
        share.plot(chips, [100 * one.mfu for one in found], marker="o", label=name)
        if found:
            ideal = [found[0].tokens * n / chips[0] for n in chips]
            speed.plot(chips, ideal, linestyle=":", color=line.get_color())
    for axes, label in ((speed, "tokens a second (dotted: in proportion)"), (share, "MFU, %")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(CHIPS, [str(n) for n in CHIPS])
        axes.set_xlabel("chips")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend()
    speed.set_yscale("log", base=2)
    share.set_ylim(bottom=0)
    rates = curves["H100"][0].machine.chip.efficiency, curves["TPU v5p"][0].machine.chip.efficiency
    gpu, tpu = (", ".join(f"{100 * part:.0f}%" for part in parts) for parts in rates)
    figure.suptitle(f"{title}: predicted scaling of a training step")
    figure.text(
        0.02,
        0.01,
        f"Estimates, not measurements. Batch {batch}, one sample a chip beyond; the fastest mesh, accumulation and "
        "remat policy that fit.\nShares of the peak in products and attention and of the memory's bandwidth: TPUs "
        f"{tpu}, H100 {gpu}. Nothing hides TPUs' collectives, work nine tenths of GPUs'.\n"
        "Links: a ring along each closed side of a pod's grid, the data-center network between two slices of v6e-256; "
        "NVLink in hosts of 8, 400 Gbit/s a GPU between them.",
        fontsize=8,
    )
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    figure.savefig(out, dpi=110)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = Parser(prog="python -m helios_jax.planner.scaling", description="Plot predicted scaling.")
    parser.add_argument("config", help="a YAML file of configs/, or its name there")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the config")
    parser.add_argument("--out", type=Path, required=True, help="the PNG to write")
    try:
        args = parser.parse_intermixed_args(argv)
        work = Work.of(program.open_config(args.config, args.overrides))
        curves = {name: [point(work, named(chips)) for chips in CHIPS] for name, named in NAMES.items()}
    except ConfigError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(f"{'machine':>12}{'batch':>7}{'tokens/s':>11}{'MFU':>6}  settings")
    for one in (one for points in curves.values() for one in points):
        found = f"{one.tokens:11.0f}{100 * one.mfu:5.0f}%" if one.settings else f"{'-':>11}{'-':>6}"
        print(f"{one.machine.name:>12}{one.batch:7}{found}  {one.settings or 'no settings fit'}")
    draw(Path(args.config).stem, curves, work.config.data.batch_size, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
