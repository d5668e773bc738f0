import json
import sys

import pytest

from tests.benchmarks import gpu


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore", "default::pytest.PytestWarning")  # those of other libraries, on models this small
def test_the_script_for_a_gpu_runs_in_a_tiny_form_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_base: str, pairs_file: str
) -> None:
    arguments = ["--tiny", "--data", pairs_file, "--tokenizer", tiny_base, "--parts", "profile", "speed", "longest"]
    monkeypatch.setattr(sys, "argv", ["gpu", *arguments])
    gpu.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith('{"part"')]
    assert [line["part"] for line in lines] == ["device", "profile", "speed", "longest", "longest", "longest"]
    assert lines[1]["top"]
    assert lines[2]["pairs_per_second"] > 0
    assert lines[2]["first"] == pytest.approx(0.6931, abs=1e-3)
    assert lines[3]["flat"] is True
    assert lines[5]["length"] == 128
