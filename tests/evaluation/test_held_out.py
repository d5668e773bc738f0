"""``test`` through the front door: the table of pairs, groups, and another checkpoint on the same pairs."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from lit_dpo.callbacks import HeldOutIntervals
from lit_dpo.cli.app import main
from lit_dpo.evaluation.held_out import ACCURACY
from tests.conftest import CHECKPOINT
from tests.tiny import made_up_rows, write_jsonl

pytestmark = pytest.mark.filterwarnings("ignore:.*")


@pytest.fixture
def scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options that name 24 scored pairs of 2 sources in all, of 20 prompts, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    rows = made_up_rows(20)
    for number, row in enumerate(rows):
        row |= {"score_chosen": 9, "score_rejected": [3, 5, 9][number % 3], "subset": ["chat", "code"][number % 2]}
    again = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows[:4]]
    one, two = write_jsonl(tmp_path / "one.jsonl", rows), write_jsonl(tmp_path / "two.jsonl", again)
    sources = json.dumps([one, two])
    options = ["--data.source", one, "--data.val_source", sources, "--data.batch_size", "5"]
    return [*options, "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]


def report_of(trained: Path, *arguments: str) -> dict[str, Any]:
    """The content of test.json."""
    main(["test", "--ckpt_path", str(trained / CHECKPOINT), *arguments])
    newest = max(Path().glob("runs/*/version_*/test.json"), key=lambda path: path.stat().st_mtime_ns)
    return dict(json.loads(newest.read_text()))


def test_the_report(trained: Path, scored: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    found = report_of(trained, *scored, "--data.group_by", "subset", "--run_name", "a")
    logged = pd.read_csv("runs/a/version_0/metrics.csv").iloc[-1]
    total = found["total"]
    assert (total["num_pairs"], total["num_prompts"]) == (24, 20)
    for name, (value, low, high) in total["metrics"].items():
        if f"test/{name}" in logged:
            assert value == pytest.approx(logged[f"test/{name}"], rel=1e-5, abs=1e-6), name
        assert low <= value <= high, name
    sizes = {(group["kind"], group["name"]): group["num_pairs"] for group in found["groups"]}
    assert sizes["source", "one"] == 20
    assert sizes["source", "two"] == 4
    assert sizes["group", "chat"] == sizes["group", "code"] == 12
    assert {name: number for (kind, name), number in sizes.items() if kind == "score margin"} == {
        "0": 7,
        "4": 8,
        "6": 9,
    }
    printed = capsys.readouterr().out
    for said in ("24 held-out pairs, 20 prompts", '"the longer one wins"', "by group", "The accuracy"):
        assert said in printed


def test_another_checkpoint(trained: Path, scored: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    best = next((trained / "version_0/checkpoints").glob("best-*.ckpt"))
    found = report_of(trained, *scored, "--against", str(best))["against"]
    assert found["model"] == str(best)
    assert found["metrics"][ACCURACY]["difference"][0] == pytest.approx(0.0, abs=1e-6), "the best is the last"
    assert "may be chance (p = 1.000)" in capsys.readouterr().out


def test_what_cannot_be_compared_or_grouped(trained: Path, scored: list[str]) -> None:
    with pytest.raises(FileNotFoundError, match="--against nowhere: there is no such file"):
        report_of(trained, *scored, "--against", "nowhere")
    with pytest.raises(ValueError, match=r"data\.group_by=sub: .* The columns are chosen, prompt, .* subset"):
        report_of(trained, *scored, "--data.group_by", "sub")


def test_a_column_of_too_many_values_groups_nothing(
    trained: Path, scored: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_dpo.data.loading.MOST_GROUPS", 1)
    with pytest.raises(ValueError, match="the held-out pairs have 2 different values"):
        report_of(trained, *scored, "--data.group_by", "subset")


@pytest.mark.ci
@pytest.mark.slow
def test_two_processes_report_what_one_does(trained: Path, scored: list[str]) -> None:
    one = report_of(trained, *scored, "--run_name", "one")
    two = report_of(trained, *scored, "--run_name", "two", "--trainer.devices", "2", "--trainer.strategy", "ddp_fork")
    assert two["total"]["num_pairs"] == 24
    for name, expected in one["total"]["metrics"].items():
        assert two["total"]["metrics"][name] == pytest.approx(expected, rel=1e-4, abs=1e-5), name


def test_pairs_of_another_data_module_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    strategy = SimpleNamespace(broadcast=lambda value: value)
    trainer: Any = SimpleNamespace(is_global_zero=True, world_size=1, loggers=[], default_root_dir=tmp_path)
    trainer.strategy, trainer.callback_metrics = strategy, {"test/loss": 0.5}
    HeldOutIntervals().on_test_end(trainer, SimpleNamespace())  # type: ignore[arg-type]
    printed = capsys.readouterr().out
    assert "No intervals: the pairs are not those of a PreferenceDataModule." in printed
    assert "test/loss" in printed
