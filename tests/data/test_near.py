"""Near duplicates are found by the similarity of their texts, and neither the template nor swapping misleads."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from lit_dpo import PreferenceDataModule
from lit_dpo.data.filters import Filters
from lit_dpo.data.near import RUN, _hashes, near_duplicates, near_prompts
from lit_dpo.data.pairs import PairDataset
from lit_dpo.data.preparation import prepare_pairs
from lit_dpo.data.rendering import ChatTemplate
from lit_dpo.data.tokenization import Truncation
from tests.tiny import tiny_tokenizer

DRAW = random.Random(0)  # noqa: S311
TEMPLATE = ChatTemplate(tiny_tokenizer())


def text(words: int) -> str:
    return " ".join("".join(DRAW.choices("abcdefghijklmnopqrst", k=5)) for _ in range(words))


def row(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def different(number: int) -> list[dict[str, Any]]:
    return [row(text(20), text(40), text(40)) for _ in range(number)]


def prepared(rows: list[dict[str, Any]]) -> PairDataset:
    return prepare_pairs(Dataset.from_list(rows), "x", TEMPLATE, Truncation(4096))[0]


def changed(words: str, number: int) -> str:
    """The text with some of its words replaced."""
    parts = words.split()
    for place in DRAW.sample(range(len(parts)), number):
        parts[place] = text(1)
    return " ".join(parts)


def test_pairs_with_few_words_changed_repeat_the_first() -> None:
    rows = different(30)
    first = rows[3]
    rows += [
        row(first["prompt"], changed(first["chosen"], 1), first["rejected"]),  # 30: near
        row(first["prompt"], first["rejected"], first["chosen"]),  # 31: swapped
        row(first["prompt"], text(40), text(40)),  # 32: another pair of the same prompt
        row(text(20), first["chosen"], changed(first["rejected"], 2)),  # 33: another prompt
        row(first["prompt"], first["chosen"], changed(first["rejected"], 1)),  # 34: near
        row(first["prompt"], changed(first["chosen"], 20), changed(first["rejected"], 20)),  # 35: half of it
    ]
    pairs = prepared(rows)
    assert np.flatnonzero(near_duplicates(pairs, 0.85)).tolist() == [30, 34]
    exact = prepared([*rows[:30], rows[3], rows[4]])
    assert np.flatnonzero(near_duplicates(exact, 1.0)).tolist() == [30, 31]


def test_short_prompts_are_not_similar_by_their_template() -> None:
    rows = [row(text(2), text(3), text(3)) for _ in range(60)]
    assert not near_duplicates(prepared(rows), 0.5).any()
    assert not near_prompts(prepared(rows[:30]), prepared(rows[30:]), 0.5).any()


def test_the_similarity_is_that_of_a_slow_count() -> None:
    one, other = (list(range(100)), [*range(60), *range(200, 240)])
    slow = [{tuple(ids[n : n + RUN]) for n in range(len(ids) - RUN + 1)} for ids in (one, other)]
    fast = [set(_hashes(np.array(ids)).tolist()) for ids in (one, other)]
    assert len(fast[0] & fast[1]) / len(fast[0] | fast[1]) == len(slow[0] & slow[1]) / len(slow[0] | slow[1])
    assert len(_hashes(np.array([4, 5]))) == 1
    assert len(_hashes(np.array([], np.int32))) == 0


def test_prompts_nearly_held_out_are_leaks() -> None:
    rows = different(30)
    held_out = [row(changed(rows[5]["prompt"], 1), text(9), text(9)), *different(4), rows[7]]
    for leaks, left in (("drop", 28), ("keep", 30)):
        data = PreferenceDataModule(
            Dataset.from_list(rows),
            val_source=Dataset.from_list(held_out),
            filters=Filters(leaks=leaks, near_duplicates=0.6),  # type: ignore[arg-type]
            tokenizer=TEMPLATE.tokenizer,
        )
        data._load(trains=True)
        report = "\n".join(data.loaded.report)
        verb = "left out " if leaks == "drop" else ""
        assert f"{verb}1 of 30 pairs: prompt also held out (first: row 7)" in report
        assert f"{verb}1 of 30 pairs: prompt nearly the same as one held out (first: row 5)" in report
        assert data.train_pairs is not None
        assert len(data.train_pairs) == left


def test_real_rows(ultrafeedback: Path) -> None:
    """Different pairs are none of them near; the same pairs again all are."""
    rows = Dataset.from_json(str(ultrafeedback / "test_prefs.jsonl"))
    pairs = prepare_pairs(rows, "x", TEMPLATE, Truncation(4096))[0]
    assert not near_duplicates(pairs, 0.7).any()
    twice = PairDataset.concatenate([pairs, pairs])
    assert np.flatnonzero(near_duplicates(twice, 0.7)).tolist() == list(range(len(pairs), 2 * len(pairs)))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasketch", None)
    with pytest.raises(ImportError, match=r"pip install 'lit_dpo\[near-duplicates\]'"):
        near_duplicates(prepared(different(2)), 0.7)


def test_a_similarity_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"near_duplicates must be in \(0, 1\]"):
        Filters(near_duplicates=1.5)
