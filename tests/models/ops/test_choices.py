"""Defaults by kind of device: which name wins, and that what is written is read again."""

from types import SimpleNamespace

import pytest

from helios_jax.models.ops import choices
from pallas_kernels.core.device import compiling_for


@pytest.fixture(autouse=True)
def table(tmp_path, monkeypatch):
    """A copy of the table that may be written to."""
    path = tmp_path / "choices.json"
    path.write_text(choices.PATH.read_text())
    monkeypatch.setattr(choices, "PATH", path)
    choices._table.cache_clear()
    yield path
    choices._table.cache_clear()


def defaults(kind: str) -> tuple[str, str]:
    with compiling_for(SimpleNamespace(platform="any", device_kind=kind)):
        return choices.default("attention"), choices.default("norms")


def test_each_kind_of_device_has_defaults():
    assert defaults("NVIDIA H100 80GB HBM3") == ("cudnn", "xla")
    assert defaults("TPU v6 lite") == ("pallas", "pallas")
    assert defaults("cpu") == defaults("an abacus") == ("xla", "xla")


def test_the_longest_name_wins_and_others_stay(table):
    before = table.read_text()
    choices.write("NVIDIA H100 80GB HBM3", {"norms": "pallas"})
    assert defaults("NVIDIA H100 80GB HBM3") == ("cudnn", "pallas")
    assert defaults("NVIDIA H200") == ("cudnn", "xla")
    assert table.read_text() == before.replace(
        '"norms": {"": "xla", "TPU"', '"norms": {"": "xla", "NVIDIA H100 80GB HBM3": "pallas", "TPU"'
    )
