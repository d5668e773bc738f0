"""The benchmark of the data runs, and its lines can be read."""

import json

import pytest

from lit_dpo.data import preparation
from tests.benchmarks import data
from tests.conftest import REPOSITORY
from tests.tiny import tiny_tokenizer


def test_the_benchmark_of_the_data_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("load_tokenizer", "disable_progress_bars"):
        monkeypatch.setattr(data, name, lambda *_: tiny_tokenizer())
    monkeypatch.setenv("LIT_DPO_CACHE", "")  # put back at the end
    monkeypatch.setattr(preparation, "Encoder", preparation.Encoder)
    source = REPOSITORY / "lit_dpo/data/examples/test_prefs.jsonl"
    monkeypatch.setattr("sys.argv", ["data", "--data", str(source), "--rounds", "1", "--million", "200"])
    data.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.get("how") for line in lines] == ["words kept", "whole texts", "words known", None]
    assert lines[-1]["rows"] >= 200
    assert all(value > 0 for line in lines for name, value in line.items() if "seconds" in name or "per_s" in name)
