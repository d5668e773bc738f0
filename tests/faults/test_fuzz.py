"""Random configurations, in a short form."""

from pathlib import Path

import pytest

from tests.faults.fuzz import fuzz, prepare

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("cases", [8, pytest.param(200, marks=pytest.mark.slow)])
def test_no_random_configuration_ends_in_a_traceback(
    tiny_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cases: int
) -> None:
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path)
    counts, failures = fuzz(cases, cases, tiny_base)
    assert failures == []
    assert counts.total() == cases
