"""Tests of callbacks run in a folder of their own."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs leave their folders in a folder of the test."""
    monkeypatch.chdir(tmp_path)
