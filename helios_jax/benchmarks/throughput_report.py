"""The throughput benchmark's figures: as JSON, and as a table for people."""

import dataclasses
import json
import os
import platform
import resource
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from helios_jax.runtime.versions import versions

PACKAGES = ("jax", "jaxlib", "flax", "torch", "diffusers", "transformers", "numpy")


@dataclass
class Comparison:
    """Seconds of one part or call on both sides; None: not measured.

    `cold_s` is our first call. `ours_runs` and `reference_runs` are warm calls, of which each pair was timed close
    together. `tflop` is the work.
    """

    what: str
    ours_runs: list[float]
    reference_runs: list[float] = field(default_factory=list)
    cold_s: float | None = None
    tflop: float | None = None
    frames: int | None = None

    @property
    def ours_s(self) -> float:
        return statistics.median(self.ours_runs)

    @property
    def reference_s(self) -> float | None:
        return statistics.median(self.reference_runs) if self.reference_runs else None

    @property
    def ratio(self) -> float | None:
        """Reference over ours: above 1 ours is faster. The median over pairs of runs."""
        pairs = zip(self.ours_runs, self.reference_runs)
        return statistics.median(theirs / ours for ours, theirs in pairs) if self.reference_runs else None

    def facts(self, rate: float) -> dict[str, Any]:
        """The row of the JSON; `rate` is the device's, in operations a second."""
        floor = None if self.tflop is None else self.tflop * 1e12 / rate
        return dataclasses.asdict(self) | {
            "ours_s": self.ours_s,
            "reference_s": self.reference_s,
            "ratio": self.ratio,
            "floor_s": floor,
            "floor_share": None if floor is None else floor / self.ours_s,
            "frames_per_s": None if self.frames is None else self.frames / self.ours_s,
        }


def peak_gib() -> float:
    """Peak of the device's memory in GiB; on a CPU, of this process's memory."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def facts() -> dict[str, Any]:
    """Hardware and versions."""
    device = jax.devices()[0]
    cpu = device.platform == "cpu"
    return {
        "device": f"{os.cpu_count()} cores of an {platform.machine()} CPU" if cpu else device.device_kind,
        "devices": jax.device_count(),
        "processor": _processor(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": versions(PACKAGES),
    }


def _processor() -> str:
    """Name of the host's processor, where Linux tells it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def table(report: dict[str, Any]) -> list[str]:
    """Markdown rows of the comparisons."""
    lines = [
        "| | ours, s | first call, s | diffusers, s | ratio | TFLOP | share of the floor |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in report["comparisons"]:
        numbers = [_number(row[key]) for key in ("ours_s", "cold_s", "reference_s", "ratio", "tflop")]
        share = "-" if row["floor_share"] is None else f"{100 * row['floor_share']:.0f}%"
        lines.append(f"| {row['what']} | {' | '.join(numbers)} | {share} |")
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def markdown(report: dict[str, Any]) -> str:
    """The whole page."""
    machine = report["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    rows = "\n".join(table(report))
    notes = "\n".join(f"- {note}" for note in report["notes"])
    return f"""# Throughput: {report["size"]} on {machine["device"]}

Made by `{report["command"]}`; [how to read it](README.md).

{machine["devices"]} x {machine["device"]}, host {machine["processor"]};
Python {machine["python"]}, {versions}. Load average at the end:
{machine["load_average"]:.1f}. {report["setting"]}

{rows}

{notes}
"""


def write(report: dict[str, Any], folder: Path) -> list[Path]:
    """The JSON and the Markdown file of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    device = "cpu" if jax.default_backend() == "cpu" else jax.devices()[0].device_kind.replace(" ", "-").lower()
    name = "-".join(filter(None, (report["size"], device, report["attention"], report["norms"])))
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / f"{name}.md").write_text(markdown(report))
    return [folder / f"{name}.json", folder / f"{name}.md"]
