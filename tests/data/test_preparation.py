from pathlib import Path

import pytest
from datasets import Dataset

from lit_dpo.data import preparation
from lit_dpo.data.filters import TIED
from lit_dpo.data.formats import Reader
from lit_dpo.data.preparation import prepare_pairs
from lit_dpo.data.rendering import ChatTemplate
from lit_dpo.data.tokenization import Truncation
from tests.tiny import CHATML, made_up_rows, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEMPLATE = ChatTemplate(TOKENIZER)


def dirty_rows() -> Dataset:
    rows = [{"prompt": f"p{n}", "chosen": f"c{n}", "rejected": f"r{n}"} for n in range(6)]
    rows[1]["chosen"] = ""
    rows[2]["rejected"] = rows[2]["chosen"]
    rows[4]["rejected"] = " "
    rows[5]["prompt"] = "cat " * 100
    return Dataset.from_list(rows)


def test_what_is_left_out_is_counted_with_its_first_row() -> None:
    pairs, report = prepare_pairs(dirty_rows(), "file.jsonl", TEMPLATE, Truncation(64))
    assert report == [
        "file.jsonl: read as: chosen and rejected",
        "file.jsonl: left out 2 of 6 pairs: empty response (first: row 1)",
        "file.jsonl: left out 1 of 6 pairs: identical responses (first: row 2)",
        "file.jsonl: left out 1 of 6 pairs: prompt leaves no room for a response (first: row 5)",
    ]
    assert [pairs.pair(index).row for index in range(len(pairs))] == [0, 3]
    assert pairs.pair(1).source == "file.jsonl"
    assert pairs.prompt(1) == ("p3", pairs.pair(1).prompt)
    assert pairs[[0, 1]].origins == (("file.jsonl", 0), ("file.jsonl", 3))


def test_the_report_is_the_same_from_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = dirty_rows()
    _, first = prepare_pairs(rows, "x", TEMPLATE, Truncation(65))
    monkeypatch.setattr(preparation, "tokenize", None)  # a second tokenization would fail
    pairs, second = prepare_pairs(rows, "x", TEMPLATE, Truncation(65))
    assert first == second
    assert len(pairs) == 2


def test_the_cache_knows_rows_truncation_and_template() -> None:
    rows = dirty_rows()

    def prompts(
        truncation: Truncation = Truncation(64), template: str = CHATML, data: Dataset = rows
    ) -> list[list[int]]:
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = template
        pairs, _ = prepare_pairs(data, "x", ChatTemplate(tokenizer), truncation)
        return [pairs.pair(index).prompt for index in range(len(pairs))]

    assert prompts() == prompts()
    assert prompts() != prompts(Truncation(64, max_prompt_length=3))
    assert prompts() != prompts(template=CHATML.replace("assistant", "model"))
    changed = rows.map(lambda row: {"prompt": row["prompt"] + "!"})
    assert prompts() != prompts(data=changed)


def test_a_row_of_another_format_is_named() -> None:
    with pytest.raises(ValueError, match="file, row 0: no column 'chosen'"):
        prepare_pairs(Dataset.from_list([{"text": "hello"}]), "file", TEMPLATE, Truncation())


def test_nothing_left_is_an_error_that_says_why() -> None:
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "b"}])
    with pytest.raises(ValueError, match=r"(?s)no usable pair is left.*identical responses"):
        prepare_pairs(rows, "file", TEMPLATE, Truncation())


def test_carving_keeps_the_pairs_of_a_prompt_together() -> None:
    rows = made_up_rows(20)
    twice = [dict(row) for row in rows for _ in range(2)]
    for index, row in enumerate(twice):
        row["rejected"] = [row["rejected"][0], {"role": "assistant", "content": f"no {index}"}]
    pairs, _ = prepare_pairs(Dataset.from_list(twice), "x", TEMPLATE, Truncation())
    train, held_out = pairs.split_off(0.25, seed=3)
    assert (len(train), len(held_out)) == (30, 10)
    assert not {train.prompt(i)[0] for i in range(30)} & {held_out.prompt(i)[0] for i in range(10)}
    assert list(pairs.split_off(0.25, seed=3)[1].indices) == list(held_out.indices)
    assert list(pairs.split_off(0.25, seed=4)[1].indices) != list(held_out.indices)
    assert len(pairs.split_off(4, seed=3)[1]) == 4
    with pytest.raises(ValueError, match="data.val_size=400"):
        pairs.split_off(400, seed=0)


def test_real_rows_with_their_dirt(ultrafeedback: Path) -> None:
    rows = Dataset.from_json(str(ultrafeedback / "train_prefs.jsonl"))
    pairs, report = prepare_pairs(rows, "train_prefs", TEMPLATE, Truncation(None))
    assert len(rows) == 900
    assert report[:2] == [
        "train_prefs: read as: chosen and rejected",
        "train_prefs: columns that are not read: messages, prompt_id",
    ]
    left_out = [line for line in report if "left out" in line]
    assert [line.split(": ")[2].split(" (")[0] for line in left_out] == ["empty response", "identical responses"]
    assert len(pairs) == 900 - sum(int(line.split()[3]) for line in left_out)
    assert sum(int(line.split()[1]) for line in report if TIED in line) > 90


def test_ranked_lists_and_scores_come_back_from_the_cache() -> None:
    rows = Dataset.from_list(
        [
            {"prompt": "the cat", "responses": ["a mat", "rain", "hills", "roof"], "scores": [4.0, 1.0, 3.0, 2.0]},
            {"prompt": "a roof", "responses": ["on", "over"], "scores": [1.0, 2.0]},
        ]
    )
    for _ in range(2):
        pairs, report = prepare_pairs(rows, "lists", TEMPLATE, Truncation(64), Reader(max_responses=4))
        assert report == ["lists: read as: ranked list"]
        batch = pairs[[0, 1]]
        assert [len(segment.responses) for segment in batch.segments] == [4, 2]
        assert batch.scores.tolist() == [4.0, 3.0, 2.0, 1.0, 2.0, 1.0]
        assert batch.pairs() == [pairs.pair(0), pairs.pair(1)]
        first = batch.segments[0]
        ends = len(first.responses) * [TOKENIZER.eos_token]
        texts = [TOKENIZER.decode(response) for response in pairs.pair(0).responses]
        assert [text.split("<")[0] for text in texts] == ["a mat", "hills", "roof", "rain"]
        assert all(text.rstrip().endswith(end) for text, end in zip(texts, ends, strict=True))
        assert len(batch.input_ids) == sum(segment.prompt + sum(segment.responses) for segment in batch.segments)
    two, _ = prepare_pairs(rows, "lists", TEMPLATE, Truncation(64))
    assert two.pair(0).between == ()
    assert two.pair(0).key != pairs.pair(0).key


def test_scores_are_asked_for_by_row() -> None:
    given = {"prompt": "p", "chosen": "c", "rejected": "r", "score_chosen": 2.0, "score_rejected": 1.0}
    pairs, _ = prepare_pairs(Dataset.from_list([given, {**given, "prompt": "q"}]), "x", TEMPLATE, Truncation(64))
    pairs.require_scores("ODPO")
    for change, message in (
        ({"score_chosen": None}, "x, row 1: the row has no scores, but ODPO needs them"),
        ({"score_chosen": 0.5}, "x, row 1: the chosen response has the score 0.5 and the rejected one 1;"),
    ):
        pairs, _ = prepare_pairs(Dataset.from_list([given, {**given, **change}]), "x", TEMPLATE, Truncation(64))
        with pytest.raises(ValueError, match=message):
            pairs.require_scores("ODPO")


def test_lists_are_cut_as_pairs_are() -> None:
    rows = Dataset.from_list([{"prompt": "p", "responses": ["cat cat cat", "cat cat mat", "cat cat cat hills", "a"]}])
    pairs, _ = prepare_pairs(rows, "x", TEMPLATE, Truncation(64, max_response_length=2), Reader(max_responses=4))
    assert [len(response) for response in pairs.pair(0).responses] == [2, 2], "what is the same once cut counts once"


def test_data_without_rows_or_in_another_librarys_format() -> None:
    with pytest.raises(ValueError, match="x: there are no rows"):
        prepare_pairs(Dataset.from_dict({"prompt": [], "chosen": [], "rejected": []}), "x", TEMPLATE, Truncation())
    rows = Dataset.from_list([{"prompt": "q", "responses": ["a", "b"], "scores": [1.0, 2.0]}])
    expected = prepare_pairs(rows, "x", TEMPLATE, Truncation())[0].pair(0)
    for name in ("numpy", "pandas"):
        assert prepare_pairs(rows.with_format(name), "x", TEMPLATE, Truncation())[0].pair(0) == expected
