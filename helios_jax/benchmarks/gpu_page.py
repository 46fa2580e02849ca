"""The GPU report's page in Markdown, and the conclusions from its rows: which defaults to change."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Conclusions:
    """Conclusions from the rows about a device.

    implementations: the fastest correct pair ("attention", "norms"), by the seconds of a block at all levels
    sizes: for each tuned op the length it was timed with, and its kernel's fastest block sizes
    wrong: cases of kernels that are wrong, move from run to run, or do not run
    """

    device: str | None
    platform: str | None
    implementations: dict[str, str]
    sizes: dict[str, tuple[int, dict[str, int]]]
    wrong: list[str]


# Kernels that are used where a choice of the model is "pallas".
KERNELS = {"attention": ("attention",), "norms": ("norm_rope", "adaln", "gated_residual")}


def conclusions(rows: list[Row]) -> Conclusions:
    """Draws conclusions from the `rows` so far."""
    machine = next((row for row in rows if row.get("what") == "device"), {})
    checks = [row for row in rows if row["phase"] == "check"]
    # The model computes in bfloat16: a kernel that is wrong in float32 alone can be its choice.
    bad = {row["op"] for row in checks if row.get("verdict") != "ok" and row["dtype"] == "bfloat16"}
    # A check that did not come to its end proves nothing.
    ended = {row["what"].removeprefix("check "): row["why"] for row in rows if row["phase"] == "phases"}
    bad |= {op for op, why in ended.items() if why and not why.startswith("exit code 1: ")}
    bad |= {op for op, why in ended.items() if why and op not in {row["op"] for row in checks}}
    unsafe = {choice for choice, ops in KERNELS.items() if bad & set(ops)}
    pairs: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for row in _last_of_blocks(rows):
        if "seconds" in row and row["from_first_pair"] < 0.05:
            pairs[row["attention"], row["norms"]].append(row["seconds"])
    levels = max((len(seconds) for seconds in pairs.values()), default=0)
    allowed = {
        pair: sum(seconds)
        for pair, seconds in pairs.items()
        if len(seconds) == levels
        and not ("attention" in unsafe and pair[0] == "pallas")
        and not ("norms" in unsafe and pair[1] == "pallas")
    }
    fastest = min(allowed, key=lambda pair: allowed[pair], default=None)
    sizes = {}
    for op in dict.fromkeys(row["op"] for row in rows if row["phase"] == "tune"):
        timed = [row for row in rows if row["phase"] == "tune" and row["op"] == op and row["sizes"] and row["seconds"]]
        if timed:
            best = min(timed, key=lambda row: row["seconds"])
            sizes[op] = best["length"], best["sizes"]
    return Conclusions(
        device=machine.get("device"),
        platform=machine.get("platform"),
        implementations=dict(zip(("attention", "norms"), fastest)) if fastest else {},
        sizes=sizes,
        wrong=[
            f"{row['op']}, {row['dtype']}, {row['what']}: {row.get('verdict') or row['why']}"
            for row in checks
            if row.get("verdict") != "ok"
        ],
    )


def _last_of_blocks(rows: list[Row]) -> list[Row]:
    """The last row of blocks for each pair and length: later rows, timed in turn, replace the first ones."""
    last = {(row["attention"], row["norms"], row["noisy"]): row for row in rows if row["phase"] == "blocks"}
    return list(last.values())


def page(rows: list[Row], size: str) -> str:
    """The whole page, as Markdown."""
    by_phase: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_phase[row["phase"]].append(row)
    device = next((row for row in rows if row.get("what") == "device"), None)
    lines = [f"# GPU report: {size} on {device['device'] if device else 'an unknown device'}", ""]
    lines += ["Made by `make gpu-report`; weights are random, of the released sizes for 14b.", ""]
    if device:
        versions = ", ".join(f"{name} {number}" for name, number in device["versions"].items())
        memory = "" if device["memory_gib"] is None else f", {device['memory_gib']:.1f} GiB of device memory for XLA"
        lines += [f"Host {device['processor']}; Python {device['python']}, {versions}{memory}.", ""]
    lines += _rates(by_phase["machine"])
    lines += _blocks(_last_of_blocks(by_phase["blocks"]))
    lines += _whole(by_phase["end_to_end"], by_phase["reference"], by_phase["reference_compiled"])
    lines += _table(
        "Kernels of three chunks, 1+1+1", by_phase["profile"], ("what", "seconds", "calls", "wall_s", "why")
    )
    lines += _table("VAE", by_phase["vae"], ("what", "seconds", "first_call_s", "psnr_of_bfloat16_db", "peak_gib"))
    lines += _table("Kernels beside their references", by_phase["check"], (
        "op", "dtype", "what", "error", "moved", "verdict", "why", "seconds"
    ))  # fmt: skip
    tuned = [row | {"sizes": row["name"]} for row in by_phase["tune"]]
    lines += _table("Block sizes", tuned, ("op", "length", "sizes", "seconds", "why"))
    lines += _table("Phases", by_phase["phases"], ("what", "seconds", "why"))
    return "\n".join([*lines, *_last_lines(rows)]) + "\n"


def _rates(rows: list[Row]) -> list[str]:
    return _table("Measured rates", [row for row in rows if row["what"] != "device"], (
        "what", "tflop_per_s", "gb_per_s"
    ))  # fmt: skip


def _blocks(rows: list[Row]) -> list[str]:
    note = "A pass is a block's time, times the number of blocks."
    return _table("A block of the transformer", rows, (
        "noisy", "tokens", "attention", "norms", "seconds", "pass_s", "tflop_per_s", "from_first_pair",
        "temporaries_gib", "why",
    ), note)  # fmt: skip


def _whole(ours: list[Row], theirs: list[Row], compiled: list[Row]) -> list[str]:
    sides = (("ours", ours), ("diffusers", theirs), ("diffusers, torch.compile", compiled))
    rows = [{"by": by, **row} for by, side in sides for row in side if row["what"] != "versions"]
    return _table("Whole videos, and their parts", rows, (
        "by", "what", "seconds", "seconds_to_first_chunk", "seconds_a_chunk", "frames_per_s", "frames_per_s_in_all",
        "error", "peak_gib", "torch_peak_gib", "why",
    ))  # fmt: skip


def _table(title: str, rows: list[Row], columns: tuple[str, ...], note: str = "") -> list[str]:
    """A section; columns that no row has are left out."""
    if not rows:
        return []
    columns = tuple(name for name in columns if any(row.get(name) not in (None, "") for row in rows))
    cells = [[name.replace("_", " ") for name in columns], ["---"] * len(columns)]
    cells += [[_cell(row.get(name)) for name in columns] for row in rows]
    return [f"## {title}", "", *([note, ""] if note else []), *(f"| {' | '.join(row)} |" for row in cells), ""]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return "" if value is None else str(value).replace("|", "/")


def _last_lines(rows: list[Row]) -> list[str]:
    """Lists the changes that the figures call for."""
    found = conclusions(rows)
    lines = ["## What to change", ""]
    if found.implementations:
        chosen = ", ".join(f"{op} by {name}" for op, name in found.implementations.items())
        lines.append(f"- fastest: {chosen}")
    lines += [
        f"- tiles of {op} up to {length} tokens: {' '.join(f'{name}={size}' for name, size in sizes.items())}"
        for op, (length, sizes) in found.sizes.items()
    ]
    lines += [f"- not right: {case}" for case in found.wrong]
    if len(lines) == 2:
        lines.append("- nothing: no kernel ran here")
    return lines
