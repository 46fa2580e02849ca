"""A bucket for the tests of this folder, with its server, and a working folder in which nothing may appear."""

import os
from pathlib import Path

import pytest
from orbax.checkpoint._src.path import gcs_utils

from tests.buckets import bucket


@pytest.fixture(scope="session", autouse=True)
def server():
    with bucket.serve() as address, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", address)  # read once, when the first array is
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
        # Orbax asks Google's own client whether folders of this bucket are real ones.
        patch.setattr(gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False)
        bucket.register()
        yield address


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty bucket, and a working folder in which nothing may appear."""
    bucket.OBJECTS.clear()
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    yield folder
    assert not list(folder.iterdir())
    assert not os.path.exists("/gs")
