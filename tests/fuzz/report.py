"""Writes the counts of a fuzzed run: python -m tests.fuzz.report counts.jsonl docs/reliability.md"""

import platform
import sys
from pathlib import Path

import jax

from tests.fuzz.attempt import counts

BEGIN, END = "<!-- counts: begin -->\n", "<!-- counts: end -->\n"
KINDS = ("accepted", "refused", "unclear", "wrong", "traceback", "hang")


def table(source: Path) -> str:
    rows = counts(source)
    lines = ["| input | tried | " + " | ".join(KINDS) + " |", "| --- " * (2 + len(KINDS)) + "|"]
    for area, found in sorted(rows.items()):
        lines.append(f"| {area} | {found.total()} | " + " | ".join(str(found[kind]) for kind in KINDS) + " |")
    total = {kind: sum(found[kind] for found in rows.values()) for kind in KINDS}
    lines.append(f"| all | {sum(total.values())} | " + " | ".join(str(total[kind]) for kind in KINDS) + " |")
    made = f"jax {jax.__version__} on {platform.machine()}, Python {platform.python_version()}"
    return "\n".join(lines) + f"\n\nMade with {made}.\n"


def main(source: str, page: str) -> None:
    path = Path(page)
    before, _, rest = path.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(before + BEGIN + table(Path(source)) + END + after)


if __name__ == "__main__":
    main(*sys.argv[1:])
