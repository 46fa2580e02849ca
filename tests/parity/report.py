"""Runs the parity tests and writes their errors: python -m tests.parity.report docs/results/parity.md"""

import importlib.metadata
import platform
import sys
from pathlib import Path

import pytest

from tests.parity.reference import MEASURED

PACKAGES = ("jax", "flax", "torch", "diffusers", "transformers", "numpy")


def main(path: str) -> int:
    """Returns pytest's exit code; the file is written only when every test passed."""
    code = pytest.main(["tests/parity", "-q", "-p", "no:randomly"])
    if code:
        return int(code)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    lines = [
        "# Parity with diffusers and transformers",
        "",
        "`make parity` on CPU. Every run draws new weights, inputs and architectures. An error is",
        "norm(ours - reference) / norm(reference). The table shows the largest error of all draws and",
        "the limit of the tests. Everything is float32 unless the row says otherwise.",
        "",
        f"Python {platform.python_version()}, {versions}; {platform.machine()}.",
        "",
        "| compared | draws | largest error | limit |",
        "| --- | --- | --- | --- |",
    ]
    for what, values in sorted(MEASURED.items()):
        lines.append(f"| {what} | {len(values)} | {max(v for v, _ in values):.1e} | {values[0][1]:.0e} |")
    lines += [
        "",
        "The tests also compare token ids with transformers' on hard strings, and the names and shapes of the 14B",
        "transformer, UMT5-XXL and the Wan 2.1 VAE with the references on the meta device. Each name is used exactly",
        "once. A folder written by diffusers' `save_pretrained` loads unchanged.",
        "",
    ]
    Path(path).write_text("\n".join(lines))
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
