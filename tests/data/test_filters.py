from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from lit_dpo import PreferenceDataModule
from lit_dpo.data.filters import AGAINST, CONTRADICTORY, DUPLICATE, LEAKED, TIED, Filters
from lit_dpo.data.findings import leave_out
from lit_dpo.data.formats import Reader
from lit_dpo.data.preparation import prepare_pairs
from lit_dpo.data.rendering import ChatTemplate
from lit_dpo.data.tokenization import Truncation
from tests.tiny import made_up_rows, tiny_tokenizer

TEMPLATE = ChatTemplate(tiny_tokenizer())


def row(chosen: str = "a mat", rejected: str = "a roof", prompt: str = "the cat?", **columns: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **columns}


def scored(better: float, worse: float, prompt: str) -> dict[str, Any]:
    return row(prompt=prompt, score_chosen=better, score_rejected=worse)


def prepared(rows: list[dict[str, Any]], **options: Any) -> tuple[list[int], list[str]]:
    """Row numbers that are kept, and the report without the format."""
    filters = Filters(**options)
    pairs, report = prepare_pairs(Dataset.from_list(rows), "x", TEMPLATE, Truncation(64), Reader(), filters)
    pairs, more = leave_out(pairs, filters)
    return [pairs.pair(index).row for index in range(len(pairs))], [*report[1:], *map(str, more)]


SCORED = [scored(3, 3, "a"), scored(3, 2.5, "b"), scored(1, 2, "c"), scored(5, 1, "d")]


@pytest.mark.parametrize(
    ("options", "kept", "report"),
    [
        ({}, [0, 1, 2, 3], [f"1 of 4 pairs: {AGAINST} (first: row 2)", f"1 of 4 pairs: {TIED} (first: row 0)"]),
        (
            {"ties": "drop"},
            [1, 2, 3],
            ["left out 1 of 4 pairs: tied scores (first: row 0)", f"1 of 4 pairs: {AGAINST} (first: row 2)"],
        ),
        ({"min_margin": 1.0}, [3], ["left out 3 of 4 pairs: score margin below 1 (first: row 0)"]),
        (
            {"exclude": "^(c|d)$", "ties": "drop"},
            [1],
            [
                "left out 2 of 4 pairs: matches data.filters.exclude=^(c|d)$ (first: row 2)",
                "left out 1 of 4 pairs: tied scores (first: row 0)",
            ],
        ),
    ],
)
def test_rows_are_left_out_by_scores_and_texts(options: dict[str, Any], kept: list[int], report: list[str]) -> None:
    assert prepared(SCORED, **options) == (kept, [f"x: {line}" for line in report])


TWICE = [row(), row(prompt="why?"), row(), row("a roof", "a mat"), row()]


@pytest.mark.parametrize(
    ("options", "kept", "counts"),
    [
        ({}, [0, 1, 2, 3, 4], ["4", "2"]),
        ({"duplicates": "drop"}, [0, 1, 3], ["4", "left out 2"]),
        ({"contradictions": "drop"}, [1], ["left out 4"]),
        ({"duplicates": "drop", "contradictions": "drop"}, [1], ["left out 4"]),  # each pair is counted once
    ],
)
def test_duplicates_and_contradictions_are_counted_or_left_out(
    options: dict[str, Any], kept: list[int], counts: list[str]
) -> None:
    found = zip(counts, ((CONTRADICTORY, 0), (DUPLICATE, 2)), strict=False)
    told = [f"x: {count} of 5 pairs: {what} (first: row {first})" for count, (what, first) in found]
    assert prepared(TWICE, **options) == (kept, told)


def test_prompts_that_are_held_out_are_not_trained_on() -> None:
    rows = made_up_rows(8)
    for leaks, expected in (("drop", [0, 1, 4, 5, 6, 7]), ("keep", list(range(8)))):
        data = PreferenceDataModule(
            Dataset.from_list(rows),
            val_source=Dataset.from_list([*rows[2:4], *made_up_rows(10)[8:]]),
            filters=Filters(leaks=leaks),  # type: ignore[arg-type]
            tokenizer=TEMPLATE.tokenizer,
        )
        data._load(trains=True)
        report = data.loaded.report
        assert data.train_pairs is not None
        assert data.val_pairs is not None
        assert [data.train_pairs.pair(index).row for index in range(len(data.train_pairs))] == expected
        assert len(data.val_pairs) == 4
        verb = "left out " if leaks == "drop" else ""
        assert report[-1] == f"the data set in memory: {verb}2 of 8 pairs: {LEAKED} (first: row 2)"
    everything = Dataset.from_list(rows)
    data = PreferenceDataModule(everything, val_source=everything, tokenizer=TEMPLATE.tokenizer)
    with pytest.raises(ValueError, match="every prompt is also held out"):
        data._load(trains=True)


def test_kept_and_left_out_rows_are_all_rows(ultrafeedback: Path) -> None:
    rows = Dataset.from_json(str(ultrafeedback / "train_prefs.jsonl"))
    filters = Filters(ties="drop", duplicates="drop", contradictions="drop", exclude="(?i)as an ai language model")
    pairs, report = prepare_pairs(rows, "x", TEMPLATE, Truncation(4096, overlong="drop"), Reader(), filters)
    pairs, more = leave_out(pairs, filters)
    report += map(str, more)
    left_out = sum(int(line.split("left out ")[1].split()[0]) for line in report if "left out" in line)
    assert len(pairs) + left_out == len(rows)
    assert len(report) > 5


@pytest.mark.parametrize(("options", "name"), [({"min_margin": -1.0}, "min_margin"), ({"exclude": "("}, "exclude")])
def test_a_filter_that_cannot_be_is_refused(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=rf"data\.filters\.{name}"):
        Filters(**options)
