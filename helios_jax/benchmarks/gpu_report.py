"""Every figure that a GPU can give, by one command that a time limit cannot spoil.

    python -m helios_jax.benchmarks.gpu_report --minutes 9                 # the 14B model, also without a network
    python -m helios_jax.benchmarks.gpu_report --size tiny --out try       # is the report itself in order?
    python -m helios_jax.benchmarks.gpu_report --write                     # what it finds becomes the device's default
    python -m helios_jax.benchmarks.gpu_report --apply REPORT.json         # the same, from a report made elsewhere

Each phase is a process of its own with a time limit, and its rows are in gpu-report-rows.jsonl of `--out` the moment
they are known; JSON and a page beside it are made anew after each phase. Phases, in this order: the machine's rates;
blocks of the model by each pair of attention and norms; whole videos, and their kernels; diffusers uncompiled; each
kernel beside its reference; the tuner, for attention and the norms; the VAE; diffusers by torch.compile. Needs no
weights and no network.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helios_jax.benchmarks.gpu_page import conclusions, page
from helios_jax.benchmarks.gpu_phases import CHOSEN
from helios_jax.benchmarks.throughput_model import SIZES
from helios_jax.models.ops import choices
from helios_jax.runtime.command import Tool
from pallas_kernels.core import tiles
from pallas_kernels.tools import check, tune
from pallas_kernels.tools.tunable import add_line

LEAST = 15.0  # seconds that must be left for a phase to begin
END_TO_END = 200.0  # seconds that the phases before end_to_end leave to it; in proportion if --minutes is below 9


@dataclass(frozen=True)
class Phase:
    """A process of the report, with its time limit in seconds."""

    name: str
    module: str
    arguments: tuple[str, ...]
    limit: float


def phases(size: str, rows: Path) -> list[Phase]:
    """All phases; for those in `CHOSEN`, `main` adds the fastest implementations, which the blocks tell."""

    def measured(name: str, limit: float) -> Phase:
        return Phase(name, "helios_jax.benchmarks.gpu_phases", (name, "--size", size, "--rows", str(rows)), limit)

    ops = list(dict.fromkeys(case.op for case in check.cases()))
    checks = [
        Phase(f"check {op}", "pallas_kernels.tools.check", (op, "--json", str(rows), "--limit", "45"), 75) for op in ops
    ]
    tunes = [
        Phase(f"tune {op}", "pallas_kernels.tools.tune", (op, "--short", "--json", str(rows), "--limit", "30"), 60)
        for op in ops
        if op in tune.OPS
    ]
    return [
        measured("machine", 40),
        measured("blocks", 120),
        measured("end_to_end", 240),
        measured("profile", 60),
        measured("reference", 120),
        *checks,
        *tunes,
        measured("vae", 90),
        measured("reference_compiled", 200),
    ]


def read(path: Path) -> list[dict[str, Any]]:
    """The rows so far; a killed process may leave half a line, which is left out."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def run(phase: Phase, limit: float, log: Path) -> dict[str, Any]:
    """Runs a phase, `limit` seconds at most; returns its row. What it prints goes to the terminal and to `log`."""
    begin = time.monotonic()
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "2"} | os.environ
    command = [sys.executable, "-u", "-m", phase.module, *phase.arguments]
    with log.open("a") as file:
        print(f"== {phase.name}, at most {limit:.0f} s", flush=True)
        print(f"== {' '.join(command)}", file=file, flush=True)
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,
        )
        last: list[str] = []
        reader = threading.Thread(target=_copy, args=(process.stdout, file, last), daemon=True)
        reader.start()
        try:
            code = process.wait(limit)
            reader.join(5)  # for its last line
            why = "" if code == 0 else f"exit code {code}: {last[-1] if last else ''}"
        except subprocess.TimeoutExpired:
            why = f"ended after {limit:.0f} s"
        finally:  # whatever it started ends with it: a worker that hangs would keep the device
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            reader.join(5)
    return {"phase": "phases", "what": phase.name, "seconds": time.monotonic() - begin, "why": why}


def _copy(source: Any, log: Any, last: list[str]) -> None:
    """Copies a phase's output to the terminal and the log; `last` keeps its last line."""
    for line in source:
        print(f"   {line}", end="", flush=True)
        log.write(line)
        log.flush()
        if line.strip():
            last[:] = [line.strip()]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code, 1 if the model itself could not be measured."""
    parser = Tool(prog="python -m helios_jax.benchmarks.gpu_report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=9, help="after which all has ended (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("docs/results/benchmarks"), help="folder of the files")
    parser.add_argument("--size", choices=SIZES, default="14b", help="of the model (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="PHASE", help="phases to run, by the first word of their names")
    parser.add_argument("--write", action="store_true", help="make what is fastest this device's default")
    parser.add_argument(
        "--apply", type=Path, metavar="REPORT", help="only write the defaults that a report's JSON says"
    )
    args = parser.parse_args(argv)
    if args.apply is not None:
        try:
            return _write_defaults(json.loads(args.apply.read_text()))
        except (OSError, ValueError) as error:
            parser.error(f"--apply {args.apply}: {error}; name the .json of a report")
    if args.minutes < 1:
        parser.error("--minutes must be at least 1")
    rows, log = args.out / "gpu-report-rows.jsonl", args.out / "gpu-report.log"
    every = phases(args.size, rows)
    names = sorted({phase.name.split()[0] for phase in every})
    if unknown := [name for name in args.only or () if name not in names]:
        parser.error(f"there is no phase {unknown[0]!r}; there are {', '.join(names)}")
    args.out.mkdir(parents=True, exist_ok=True)
    for path in (rows, log):
        path.unlink(missing_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the phase under way ends, too
    end = time.monotonic() + 60 * args.minutes
    kept = min(END_TO_END, 60 * args.minutes * END_TO_END / 540)
    for i, phase in enumerate(every):
        if args.only and phase.name.split()[0] not in args.only:
            continue
        later = any(other.name == "end_to_end" for other in every[i + 1 :]) and not args.only
        left = end - time.monotonic() - (kept if later else 0)
        if left < LEAST:
            result = {"phase": "phases", "what": phase.name, "seconds": 0.0, "why": "no time was left"}
        else:
            if phase.name in CHOSEN:
                chosen = conclusions(read(rows)).implementations
                more = [text for op, name in chosen.items() for text in (f"--{op}", name)]
                phase = Phase(phase.name, phase.module, (*phase.arguments, *more), phase.limit)
            result = run(phase, min(phase.limit, left), log)
        add_line(rows, result)
        print(f"   {result['seconds']:.0f} s{', ' if result['why'] else ''}{result['why']}", flush=True)
        _save(args.out, read(rows), args.size, args.only or [])
        if args.write and phase.name.startswith("tune"):
            _write_defaults(read(rows))  # for the phases that follow
    found = read(rows)
    print(page(found, args.size))
    if args.write and _write_defaults(found):
        return 1
    return 0 if any(row["phase"] == "end_to_end" and "frames_per_s" in row for row in found) or args.only else 1


def _save(folder: Path, rows: list[dict[str, Any]], size: str, only: list[str]) -> None:
    """Writes the page and its JSON; with `only`, under other names, so that no whole report is replaced."""
    device = next((row["device"] for row in rows if row.get("what") == "device"), "unknown device")
    name = "-".join(["gpu-report", size, device.replace(" ", "-").lower(), *only])
    (folder / f"{name}.md").write_text(page(rows, size))
    (folder / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")


def _write_defaults(rows: list[dict[str, Any]]) -> int:
    found = conclusions(rows)
    if found.device is None or found.platform == "cpu":
        print("gpu_report: no accelerator was measured, so there are no defaults to write", file=sys.stderr)
        return 2
    if found.implementations:
        choices.write(found.device, found.implementations)
    for op, (length, sizes) in found.sizes.items():
        tiles.write(op, found.device, length, sizes)
    print(f"defaults for {found.device} are in {choices.PATH.name} and {tiles.PATH.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
