from typing import Any

import pytest

from lit_dpo.data.pairs import PreferencePair, RowError, read_pair

USER = {"role": "user", "content": "Why?"}
GOOD, BAD = {"role": "assistant", "content": "Because."}, {"role": "assistant", "content": "Dunno."}
PAIR = PreferencePair([USER], GOOD, BAD)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Why?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "Why?", "chosen": "Because.", "rejected": "Dunno."},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [USER], "chosen": "Because.", "rejected": "Dunno."},
        {"prompt": "Why?", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "Why?", "chosen": [{**GOOD, "tool_calls": None}], "rejected": [BAD]},
    ],
)
def test_every_format_gives_the_same_pair(row: dict[str, Any]) -> None:
    assert read_pair(row) == PAIR


def test_earlier_turns_and_a_system_message_belong_to_the_prompt() -> None:
    system = {"role": "system", "content": "Be kind."}
    turns = [system, USER, GOOD, {"role": "user", "content": "Really?"}]
    pair = read_pair({"chosen": [*turns, GOOD], "rejected": [*turns, BAD]})
    assert pair == PreferencePair(turns, GOOD, BAD)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Why?", "chosen": "", "rejected": "no"}, "empty response"),
        ({"prompt": "Why?", "chosen": "yes", "rejected": "  \n"}, "empty response"),
        ({"prompt": "Why?", "chosen": None, "rejected": "no"}, "empty response"),
        ({"chosen": [], "rejected": [USER, BAD]}, "empty response"),
        ({"prompt": " ", "chosen": "yes", "rejected": "no"}, "empty prompt"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "empty prompt"),
        ({"prompt": "Why?", "chosen": "same", "rejected": "same"}, "identical responses"),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "identical responses"),
        ({"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, BAD, USER, BAD]}, "more than one answer turn"),
        ({"chosen": [USER, USER], "rejected": [USER, BAD]}, "more than one answer turn"),
    ],
)
def test_a_pair_that_cannot_be_trained_on_gives_its_reason(row: dict[str, Any], reason: str) -> None:
    assert read_pair(row) == reason


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "Why?", "answer": "yes"}, "no column 'chosen'"),
        ({"chosen": "yes", "rejected": "no"}, "'prompt' is needed"),
        ({"prompt": "Why?", "chosen": "yes", "rejected": [BAD]}, "both be strings or both be lists"),
        ({"prompt": "Why?", "chosen": [{"text": "yes"}], "rejected": [BAD]}, "needs 'role' and 'content'"),
        ({"prompt": 3, "chosen": "yes", "rejected": "no"}, "must be a string or a list"),
    ],
)
def test_another_format_is_an_error(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        read_pair(row)
