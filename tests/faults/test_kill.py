"""Runs that are killed at random moments end with the adapters of a run that nothing interrupted. A short form."""

from pathlib import Path

import pytest

from tests.faults.kill import kill


@pytest.mark.parametrize(
    ("kills", "ranks"),
    [pytest.param(2, 1, marks=[pytest.mark.slow, pytest.mark.ci]), pytest.param(10, 2, marks=pytest.mark.slow)],
)
def test_killed_runs_end_as_if_they_had_not_been_killed(
    kills: int, ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIT_DPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    done, identical = kill(kills, ranks)
    assert done >= kills
    assert identical == done
