"""Wrong labels: ranking, the share of flipped ones, folds, decisions and the cleaned set."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lit_dpo import PreferenceDataModule
from lit_dpo.cli.app import main
from lit_dpo.evaluation.statistics import Resampling
from lit_dpo.evaluation.trained import find_checkpoint
from lit_dpo.report.cleaning import SourceRows, flipped, read_decisions, write_cleaned
from lit_dpo.report.evidence import read_lines, write_lines
from lit_dpo.report.folds import CrossFit, cross_fitted, fold_numbers, stored_optimizer
from lit_dpo.report.labels import find_suspects, load_training
from lit_dpo.report.suspects import calibrated_scale, flipped_share, rank
from tests.conftest import CHECKPOINT
from tests.tiny import made_up_rows, write_jsonl

NONE = np.zeros((0, 1))


def test_the_lowest_mean_margin_is_the_most_suspicious() -> None:
    ranking = rank(np.array([[1.0, 3.0], [-1.0, -2.0], [0.5, np.nan]]))
    assert ranking.order.tolist() == [1, 2, 0]
    assert ranking.margins.tolist() == [2.0, -1.5, 0.5]
    assert ranking.spread.tolist() == [1.0, 0.5, 0.0]
    assert ranking.wrong[1] > 0.5 > ranking.wrong[0]


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_the_scale_makes_margins_log_odds(scale: float) -> None:
    generator = np.random.default_rng(0)
    odds = generator.normal(0, 2, 40_000)
    agrees = generator.random(40_000) < 1 / (1 + np.exp(-np.abs(odds)))
    margins = np.where(agrees, np.abs(odds), -np.abs(odds)) / scale
    assert calibrated_scale(margins) == pytest.approx(scale, rel=0.05)
    assert calibrated_scale(-margins) == 0.0
    assert np.isfinite(calibrated_scale(np.ones(10)))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3])
def test_the_share_of_flipped_labels_is_found(share: float) -> None:
    """Simulated: a model that is right in 80 % of the pairs, and labels of which some are flipped."""
    generator = np.random.default_rng(2)
    margins = np.abs(generator.normal(0, 1, 6000)) * np.where(generator.random(6000) < 0.8, 1, -1)
    trusted, own = margins[:2000], margins[2000:] * np.where(generator.random(4000) < share, -1, 1)
    found = flipped_share(
        rank(own[:, None]), np.arange(4000), trusted[:, None], np.arange(2000), Resampling(num_resamples=300)
    )
    assert found.by_trusted is not None
    assert found.by_trusted.value == pytest.approx(share, abs=0.04)
    assert found.by_trusted.low <= share <= found.by_trusted.high
    assert found.by_confidence.value >= share - 0.02, "the model's own errors count in it"


def test_a_model_that_knows_nothing_tells_nothing() -> None:
    found = flipped_share(rank(-np.ones((20, 1))), np.arange(20), NONE, NONE[:, 0], Resampling(num_resamples=100))
    assert np.isnan(found.by_confidence.value)
    assert found.by_trusted is None
    worse = flipped_share(
        rank(np.ones((20, 1))), np.arange(20), -np.ones((9, 1)), np.arange(9), Resampling(num_resamples=100)
    )
    assert worse.by_trusted is not None
    assert np.isnan(worse.by_trusted.value)


def test_pairs_of_a_prompt_are_in_one_fold(tiny_base: str, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"the cat {place // 3}", **{side: row[side][-1]["content"] for side in ("chosen", "rejected")}}
        for place, row in enumerate(made_up_rows(30))
    ]
    data = PreferenceDataModule(write_jsonl(tmp_path / "p.jsonl", rows), val_size=3, tokenizer=tiny_base)
    data.prepare_data()
    data.setup("fit")
    pairs: Any = data.train_pairs
    numbers = fold_numbers(pairs, 3, 0)
    assert set(numbers) == {0, 1, 2}
    prompts = pairs.digests("prompt_key")
    assert all(len(set(numbers[prompts == prompt])) == 1 for prompt in set(prompts))
    with pytest.raises(ValueError, match=r"9 different prompts cannot be parted into fit\.folds=50"):
        fold_numbers(pairs, 50, 0)


@pytest.fixture(scope="module")
def learned(tiny_base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run on pairs with a rule: the rejected response ends with "!". Every fifth is flipped."""
    folder = tmp_path_factory.mktemp("flipped")
    rows = made_up_rows(60)
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    source = write_jsonl(folder / "p.jsonl", [swapped[n] if n % 5 == 0 else row for n, row in enumerate(rows)])
    held_out = write_jsonl(folder / "h.jsonl", made_up_rows(80)[60:])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        arguments = ["--model.base", tiny_base, "--data.source", source, "--data.val_source", held_out]
        arguments += ["--model.optimizer", "torch.optim.AdamW", "--model.optimizer.lr", "0.02", "--run_name", "r"]
        arguments += [
            "--guard.max_drop",
            "null",
            "--trainer.accelerator",
            "cpu",
            "--trainer.enable_progress_bar",
            "false",
            "--data.batch_size",
            "4",
        ]
        main(["fit", *arguments, "--samples.num_prompts", "0", "--trainer.max_epochs", "2"])
    return folder / "runs/r" / CHECKPOINT


@pytest.mark.ci
@pytest.mark.slow
def test_flipped_labels_are_found_by_models_that_did_not_see_them(learned: Path) -> None:
    trained = find_checkpoint(learned)
    found = find_suspects(
        trained, "cross_fit", CrossFit(folds=2, epochs=2), Resampling(num_resamples=200), progress_bar=False
    )
    suspicious = {row["row"] for row in found.lines(12)}
    assert len(suspicious & set(range(0, 60, 5))) >= 8, "of 12 flipped pairs; by chance 2.4"
    assert found.share.by_trusted is not None
    assert found.share.by_trusted.low <= 0.2 <= found.share.by_trusted.high
    again = cross_fitted(
        find_checkpoint(learned), found.training.train, found.training.held_out, CrossFit(2, 2), progress_bar=False
    )
    np.testing.assert_allclose(np.nanmean(again.values, axis=1), found.ranking.margins, rtol=0, atol=1e-12)


def test_the_dynamics_of_the_run_itself(learned: Path) -> None:
    lines = read_lines(learned.parents[1] / "evidence/dynamics.jsonl")
    assert len(lines) == 60
    assert {len(line["margins"]) for line in lines} == {2}, "one margin an epoch"
    first = {line["row"]: line["margins"][0] for line in lines}
    assert sum(value == 0 for value in first.values()) >= 4, "the first batch is measured before any step"
    found = find_suspects(find_checkpoint(learned), "dynamics", CrossFit(), Resampling(num_resamples=100))
    suspicious = {row["row"] for row in found.lines(12)}
    assert len(suspicious & set(range(0, 60, 5))) >= 6
    assert found.share.by_trusted is None


def test_the_command_and_the_cleaned_set(learned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["suspects", "--ckpt_path", str(learned), "--output", str(tmp_path)]
    main([*command, "--method", "dynamics", "--top", "5", "--progress_bar", "false"])
    printed = capsys.readouterr().out
    assert "60 training pairs, margins by dynamics" in printed
    assert "rank    margin" in printed
    page = (tmp_path / "suspects.html").read_text()
    assert page.count("<article") == 5
    lines = read_lines(tmp_path / "suspects.jsonl")
    assert len(lines) == 60
    assert {"rank", "source", "row", "margin", "spread", "wrong", "action", "prompt", "chosen"} <= lines[0].keys()
    lines[0]["action"], lines[1]["action"] = "flip", "drop"
    write_lines(tmp_path / "mine.jsonl", lines)
    write_lines(tmp_path / "suspects.jsonl", lines)
    with pytest.raises(ValueError, match="holds decisions, which would be lost"):
        main([*command, "--method", "dynamics"])
    main([*command, "--apply", str(tmp_path / "mine.jsonl")])
    assert "58 pairs kept, 1 flipped; 1 dropped" in capsys.readouterr().out
    cleaned = read_lines(tmp_path / "cleaned.jsonl")
    assert len(cleaned) == 59
    turned = next(row for row in cleaned if row["prompt"] == lines[0]["prompt"])
    assert (turned["chosen"], turned["rejected"]) == (lines[0]["rejected"], lines[0]["chosen"])
    trained = find_checkpoint(learned)
    data = PreferenceDataModule(str(tmp_path / "cleaned.jsonl"), val_size=4, tokenizer=trained.tokenizer)
    data.prepare_data()
    assert len(data.train_pairs) + len(data.val_pairs) == 59  # type: ignore[arg-type]


def test_rows_of_any_format_are_written_in_one(tiny_base: str, tmp_path: Path) -> None:
    rows = [
        {"question": "the cat?", "chosen": "sat", "rejected": "ran", "score_chosen": 9, "score_rejected": 2},
        {"question": "the mat?", "chosen": "on", "rejected": "over", "score_chosen": 5, "score_rejected": 4},
    ]
    source = write_jsonl(tmp_path / "p.jsonl", rows)
    data = PreferenceDataModule(
        source, val_source=source, tokenizer=tiny_base, columns={"prompt": "question"}, system="be a cat",
        filters={"leaks": "keep"},  # type: ignore[arg-type]
    )  # fmt: skip
    data.prepare_data()
    assert data.loaded.train is not None
    reader = SourceRows(data.loading, data.loaded)
    path = tmp_path / "cleaned.jsonl"
    counts = write_cleaned(data.loaded.train, reader, {(source, 1): "flip"}, path)
    assert counts == {"keep": 1, "flip": 1, "drop": 0}
    kept, turned = (json.loads(line) for line in path.read_text().splitlines())
    assert [turn["role"] for turn in kept["prompt"]] == ["system", "user"]
    assert (kept["score_chosen"], kept["score_rejected"]) == (9, 2)
    assert turned["chosen"][0]["content"] == "over"
    assert "score_chosen" not in turned, "a score would contradict the label"
    assert flipped(flipped(kept)) == {name: kept[name] for name in ("prompt", "chosen", "rejected")}
    with pytest.raises(ValueError, match="row 7, which is no training pair"):
        write_cleaned(data.loaded.train, reader, {(source, 7): "drop"}, path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"source": "a", "row": 1}', "line 1 needs source, row and action"),
        ('{"source": "a", "row": 1, "action": "turn"}', "action is keep, flip, drop, not 'turn'"),
        ('{"source": "a", "row": 1, "action": "flip"}\n{"source": "a", "row": 1, "action": "drop"}', "two different"),
        ("flip", "line 1 is no JSON"),
    ],
)
def test_decisions_that_cannot_be_followed(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "d.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        read_decisions(tmp_path / "d.jsonl")
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        read_decisions(tmp_path / "nothing.jsonl")


def test_only_known_optimizers_are_built_from_a_checkpoint() -> None:
    made = stored_optimizer({"class_path": "torch.optim.adamw.AdamW", "init_args": {"lr": 0.3}})
    assert made([torch.nn.Parameter(torch.ones(1))]).defaults["lr"] == 0.3
    for path in ("os.system", "", "torch.optimal.Mine"):
        with pytest.raises(ValueError, match="only those of torch.optim and bitsandbytes.optim"):
            stored_optimizer({"class_path": path})


def test_what_cannot_be_ranked(trained: Path, tmp_path: Path) -> None:
    run = find_checkpoint(trained / CHECKPOINT)
    with pytest.raises(ValueError, match="fit.folds is at least 2"):
        CrossFit(folds=1)
    with pytest.raises(ValueError, match=r"fewer than fit\.checks=50"):
        cross_fitted(run, load_training(run).train, None, CrossFit(checks=50), progress_bar=False)
    run.data["streaming"] = True
    with pytest.raises(ValueError, match="a stream, which is not kept"):
        load_training(run)
    run.data["source"] = None
    with pytest.raises(ValueError, match="does not tell its data"):
        load_training(run)
    moved = tmp_path / "last.ckpt"
    moved.write_bytes((trained / CHECKPOINT).read_bytes())
    with pytest.raises(ValueError, match="tells no margins of training pairs"):
        find_suspects(find_checkpoint(moved), "dynamics", CrossFit(), Resampling())
