"""Runs the parity tests and writes what they measured: python -m tests.parity.report docs/parity.md"""

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
        "Made by `make parity` on CPU, with weights, inputs and architectures drawn anew by each run. An error is",
        "norm(ours - reference) / norm(reference); the worst of all draws is shown, beside the bar of the tests.",
        "Everything is float32 unless the row says otherwise.",
        "",
        f"Python {platform.python_version()}, {versions}; {platform.machine()}.",
        "",
        "| compared | draws | largest error | bar |",
        "| --- | --- | --- | --- |",
    ]
    for what, values in sorted(MEASURED.items()):
        lines.append(f"| {what} | {len(values)} | {max(v for v, _ in values):.1e} | {values[0][1]:.0e} |")
    lines += [
        "",
        "Also held by the tests: token ids equal to transformers' for hard strings; names and shapes of the 14B",
        "transformer, UMT5-XXL and the Wan 2.1 VAE equal to those on the meta device, each used exactly once;",
        "a folder written by diffusers' `save_pretrained` loads as it is.",
        "",
    ]
    Path(path).write_text("\n".join(lines))
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
