"""One line that says where the run is, on a terminal and in a log file."""

import re
import sys
from typing import Any

import pytest

from lit_dpo.callbacks import StepProgress
from tests.test_module import data, fit, module

pytestmark = pytest.mark.filterwarnings(
    "ignore:The number of training batches",
    "ignore:The '.*dataloader' does not have many workers",
)
LINE = re.compile(
    r"step \d+/4  loss \d\.\d{3}  acc \d\.\d\d  margin -?\d+\.\d\d  lr \d\.\de[+-]\d\d  [\d.e+]+ pairs/s  ETA \d+:\d\d"
)


def shown(tiny_base: str, pairs_file: str, **options: Any) -> None:
    fit(
        module(tiny_base),
        data(pairs_file),
        callbacks=[StepProgress(every_n_seconds=0.0)],
        enable_progress_bar=True,
        **options,
    )


def test_a_log_file_gets_whole_lines(tiny_base: str, pairs_file: str, capfd: pytest.CaptureFixture[str]) -> None:
    shown(tiny_base, pairs_file)
    printed = capfd.readouterr().err
    lines = [line for line in printed.splitlines() if line.startswith("step")]
    assert [line.split()[1] for line in lines if LINE.fullmatch(line)] == ["1/4", "2/4", "3/4", "4/4"]
    assert re.fullmatch(r"step 4/4  held out  loss \d\.\d{3}  acc \d\.\d\d  margin -?\d+\.\d\d", lines[-1])
    assert not any("\r" in line or "\x1b" in line for line in lines)


@pytest.mark.parametrize(("columns", "fields"), [("80", 6), ("40", 3)])
def test_a_terminal_gets_one_line_that_fits(
    tiny_base: str,
    pairs_file: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    columns: str,
    fields: int,
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", columns)
    shown(tiny_base, pairs_file)
    frames = [
        frame.strip() for frame in re.split(r"[\r\n]", capfd.readouterr().err) if "pairs" in frame or "step" in frame
    ]
    steps = [frame for frame in frames if frame.startswith("step 3/4")]
    assert len(steps) == 1
    assert len(steps[0].split("  ")) >= fields
    assert all(len(frame) < int(columns) for frame in frames if frame.startswith("step"))
    assert any(frame.startswith("held-out pairs, batch 1/1") for frame in frames)


def test_only_the_first_rank_shows_it(capfd: pytest.CaptureFixture[str]) -> None:
    bar = StepProgress()
    bar.disable()
    bar._rewrite(["step 1/2"], or_write=True)
    bar._write(["step 2/2"])
    assert capfd.readouterr().err == ""
    bar.enable()
    bar._write(["step 2/2"])
    assert capfd.readouterr().err == "step 2/2\n"


def test_a_negative_pause_is_refused() -> None:
    with pytest.raises(ValueError, match=r"progress\.every_n_seconds must be 0 or more"):
        StepProgress(-1.0)
