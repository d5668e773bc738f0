"""Whatever a row holds, it becomes a pair or is left out for a reason. Nothing else happens."""

import random
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from lit_dpo.data.encoding import Encoder
from lit_dpo.data.filters import Filters
from lit_dpo.data.formats import Reader
from lit_dpo.data.formats.context import PROMPT, SYSTEM
from lit_dpo.data.preparation import MANY_ROWS, Preparation, prepare_pairs
from lit_dpo.data.rendering import ChatTemplate
from lit_dpo.data.sources import load_rows
from lit_dpo.data.tokenization import Truncation
from tests.tiny import tiny_tokenizer, write_jsonl

TOKENIZER = tiny_tokenizer()
NAMES = (
    *(*PROMPT, *SYSTEM, "chosen", "rejected", "chosen_response", "rejected_response", "tools", "history"),
    *("completions", "responses", "answers", "scores", "output", "overall_preference", "response1", "response2"),
    *("response_a", "response_b", "winner", "human_ref_A", "human_ref_B", "labels", "preferred_output", "image"),
    *("non_preferred_output", "score_chosen", "score_rejected", "chat_template_kwargs", "better_response_id", "id"),
)


def value(draw: random.Random, depth: int = 0) -> Any:
    """Any value that JSON can hold, often one that a format knows."""
    texts = ("", " ", "a mat", "the cat?", "Human: hi", "\n\nHuman: hi\n\nAssistant: yes", "[", '{"role": "user"}')
    plain = (*texts, None, True, 0, 1, 2.5, -1, float("nan"), 1e400, "<|im_end|>", "\udcff", "é" * 30, "[1, 2]")
    role = draw.choice(["user", "assistant", "system", "tool", "gpt", "human", "", None, 3])
    message = {draw.choice(["role", "from"]): role, draw.choice(["content", "value"]): draw.choice(plain)}
    kinds: list[Any] = [draw.choice(plain), draw.choice(texts), message]
    if depth < 3:
        kinds.append([value(draw, depth + 1) for _ in range(draw.randrange(4))])
        kinds.append({draw.choice(NAMES): value(draw, depth + 1) for _ in range(draw.randrange(3))})
        kinds.append([{"role": "user", "content": "why?"}, message])
        kinds.append([{"response": draw.choice(plain), "rank": draw.choice(plain), "score": draw.choice(plain)}] * 2)
    return draw.choice(kinds)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("multi_turn", ["drop", "answers"])
def test_a_row_becomes_a_pair_or_is_left_out(seed: int, multi_turn: Any) -> None:
    draw = random.Random(seed)  # noqa: S311
    preparation = Preparation(
        "rows",
        ChatTemplate(TOKENIZER),
        Encoder(TOKENIZER, keep_words=False),
        Truncation(64),
        Reader(multi_turn=multi_turn, max_responses=draw.choice([2, 4])),
        Filters(ties="drop", exclude="why"),
        "drop",
    )
    kept = 0
    for number in range(250):
        names = draw.sample(NAMES, draw.randrange(1, 6))
        row = {name: value(draw) for name in names}
        if number % 2:  # nearly a pair
            row |= {name: f"{name} {number}" for name in ("prompt", "chosen", "rejected")}
            row |= {draw.choice(NAMES): value(draw)}
        found = preparation.row(row, number)
        assert found["row"] == number
        if found["reason"]:
            assert not found["chosen"]
            continue
        kept += 1
        assert found["prompt"]
        assert found["chosen"] != found["rejected"]
        assert min(len(found["chosen"]), len(found["rejected"])) > 0
        assert found["num_tokens"] <= 64 * (2 + len(found["between"]))
    assert kept


def test_kept_and_left_out_are_all_rows() -> None:
    draw = random.Random(0)  # noqa: S311
    texts = ["", " ", "a mat", "a roof", "the cat?", "long " * 40, "<|im_end|>"]
    rows = [{name: draw.choice([*texts, None]) for name in ("prompt", "chosen", "rejected")} for _ in range(300)]
    made = ChatTemplate(TOKENIZER)
    pairs, report = prepare_pairs(Dataset.from_list(rows), "rows", made, Truncation(32), on_bad_row="drop")
    left_out = [int(line.split("left out ")[1].split()[0]) for line in report if "left out" in line]
    assert len(left_out) > 3
    assert len(pairs) + sum(left_out) == 300


def test_a_row_of_ten_megabytes(tmp_path: Path) -> None:
    """It is cut like any other, and the rows beside it are read."""
    small = {"prompt": "the cat?", "chosen": "a mat", "rejected": "a roof"}
    large = {"prompt": "the cat?", "chosen": "a mat and a roof " * 600_000, "rejected": "a roof"}
    path = write_jsonl(tmp_path / "rows.jsonl", [small, large, *[small] * (MANY_ROWS - 2)])
    assert (tmp_path / "rows.jsonl").stat().st_size > 10e6
    rows, place = load_rows(path, None, ("train",))
    pairs, _ = prepare_pairs(rows, place, ChatTemplate(TOKENIZER), Truncation(64))
    assert [pairs.pair(index).row for index in range(MANY_ROWS)] == list(range(MANY_ROWS))
    assert pairs.pair(1).num_tokens < 2 * 64
