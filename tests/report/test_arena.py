"""The comparison page without a page: answers, votes, pairs, the running win rate."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lit_dpo.data.formats import PreferencePair, Reader
from lit_dpo.evaluation.trained import Trained, find_checkpoint
from lit_dpo.report.arena import Arena, Round, Side
from lit_dpo.report.compare_page import build_page
from lit_dpo.report.evidence import read_lines
from tests.conftest import CHECKPOINT


@pytest.fixture(scope="module")
def model(trained: Path) -> Trained:
    return find_checkpoint(trained / CHECKPOINT)


def arena(model: Trained, folder: Path, **options: Any) -> Arena:
    return Arena(Side("aligned", model), Side("base", model, initial=True), folder, **options)


def test_two_answers_grow_and_a_vote_becomes_a_pair(model: Trained, tmp_path: Path) -> None:
    match = arena(model, tmp_path, blind=False)
    assert match.standing().startswith("No votes yet.")
    seen = [list(one.texts) for one in match.ask("the cat", "be a cat", max_new_tokens=6, temperature=0.0)]
    *_, current = match.ask("the cat", "be a cat", max_new_tokens=6, temperature=0.0)
    assert seen[-1] == current.texts, "greedy decoding gives the same answers"
    assert any(left and not right for left, right in seen), "one after the other"
    assert current.order == (0, 1)
    told = match.vote(current, "left")
    assert told.startswith("Left was aligned, right was base.")
    assert "1 won, 0 tied, 0 lost. Win rate 100% [21%, 100%]: not told apart yet." in match.standing()
    row = read_lines(tmp_path / "pairs.jsonl")[0]
    pair = Reader()(row).result
    assert isinstance(pair, PreferencePair)
    assert [turn["role"] for turn in pair.prompt] == ["system", "user"]
    assert pair.chosen[0]["content"] == current.texts[0].strip()
    with pytest.raises(ValueError, match="Vote once"):
        match.vote(current, "left")


def finished(order: tuple[int, int], left: str = "a", right: str = "b") -> Round:
    return Round([{"role": "user", "content": "hi"}], order, texts=[left, right], finished=True)


def test_places_are_hidden_and_counted_right(model: Trained, tmp_path: Path) -> None:
    match = arena(model, tmp_path)
    match.vote(finished((1, 0)), "left")  # the base won
    match.vote(finished((1, 0)), "right")  # the aligned one
    match.vote(finished((0, 1)), "tie")
    assert match.scores == [0.0, 1.0, 0.5]
    assert len(read_lines(tmp_path / "pairs.jsonl")) == 2
    orders = set()
    for _ in range(12):
        steps = match.ask("the", max_new_tokens=1)
        orders.add(next(steps).order)
        steps.close()  # type: ignore[attr-defined]
    assert orders == {(0, 1), (1, 0)}


def test_no_pair_of_answers_that_are_alike_or_empty(model: Trained, tmp_path: Path) -> None:
    match = arena(model, tmp_path)
    for left, right in (("a", "a "), ("", "b")):
        assert "there is no pair" in match.vote(finished((0, 1), left, right), "left")
    assert not (tmp_path / "pairs.jsonl").exists()
    assert len(match.scores) == 2


def test_votes_of_before_count_if_the_models_are_the_same(model: Trained, tmp_path: Path) -> None:
    arena(model, tmp_path).vote(finished((0, 1)), "left")
    assert arena(model, tmp_path).scores == [1.0]
    lines = read_lines(tmp_path / "votes.jsonl")
    lines[0]["models"][0] = "another"
    (tmp_path / "votes.jsonl").write_text(json.dumps(lines[0]) + "\n")
    assert arena(model, tmp_path).scores == []


def test_a_blank_prompt_and_an_unfinished_round(model: Trained, tmp_path: Path) -> None:
    match = arena(model, tmp_path)
    with pytest.raises(ValueError, match="Write a prompt first"):
        next(match.ask("  "))
    with pytest.raises(ValueError, match="after both have answered"):
        match.vote(Round([], (0, 1)), "left")


def test_errors_of_a_model_reach_the_reader(model: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("lit_dpo.report.arena.answers", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(arena(model, tmp_path).ask("the"))


def test_without_gradio_the_extra_is_named(model: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lit_dpo\[compare\]'"):
        build_page(arena(model, tmp_path), [], 8, 0.0, None)
