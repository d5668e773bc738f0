from typing import Any

import pytest

from lit_dpo.data.formats import PreferencePair, Reader, RowError

USER = {"role": "user", "content": "Why?"}
GOOD, BAD = {"role": "assistant", "content": "Because."}, {"role": "assistant", "content": "Dunno."}
PAIR = PreferencePair([USER], [GOOD], [BAD])


def read_pair(row: dict[str, Any], max_responses: int = 2) -> PreferencePair | str:
    return Reader(max_responses=max_responses)(row).result


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
    assert pair == PreferencePair(turns, [GOOD], [BAD])


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
        ({"chosen": [USER, USER], "rejected": [USER, BAD]}, "no answer at the end"),
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


ULTRAFEEDBACK = {
    "instruction": "Why?",
    "completions": [
        {"response": "B", "fine-grained_score": 3.0, "overall_score": 10.0},  # an overall score that was misread
        {"response": "A", "fine-grained_score": 4.5, "overall_score": 7.0},
        {"response": "D", "fine-grained_score": 1.25, "overall_score": 2.0},
        {"response": "C", "fine-grained_score": 2.0, "overall_score": 5.0},
    ],
}


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize(
    "row",
    [
        ULTRAFEEDBACK,
        {"prompt": "Why?", "responses": ["C", "A", "B", "D"], "scores": [2.0, 4.5, 3.0, 1.25]},
        {"prompt": [USER], "responses": [answer("A"), answer("B")[0], "C", "D"], "scores": [4.5, 3.0, 2.0, 1.25]},
    ],
)
def test_lists_are_ranked_by_their_scores(row: dict[str, Any]) -> None:
    scores = (4.5, 3.0, 2.0, 1.25)
    assert read_pair(row, 4) == PreferencePair([USER], *map(answer, "AD"), tuple(map(answer, "BC")), scores)
    assert read_pair(row, 3) == PreferencePair([USER], *map(answer, "AD"), (answer("C"),), (4.5, 2.0, 1.25))
    assert read_pair(row) == PreferencePair([USER], *map(answer, "AD"), (), (4.5, 1.25)), "best and worst"


def test_lists_without_scores_are_from_best_to_worst() -> None:
    pair = read_pair({"prompt": "Why?", "responses": ["C", "A", "B"]}, 3)
    assert pair == PreferencePair([USER], answer("C"), answer("B"), (answer("A"),))


def test_scores_of_two_scales_are_not_mixed() -> None:
    scored = [("A", 3.5, 9.0), ("B", None, 7.0), ("C", 4.5, 2.0)]
    completions = [{"response": r, "fine-grained_score": f, "overall_score": o} for r, f, o in scored]
    pair = read_pair({"instruction": "Why?", "completions": completions}, 3)
    assert pair == PreferencePair([USER], answer("A"), answer("C"), (answer("B"),), (9.0, 7.0, 2.0))


def test_of_equal_scores_one_response_is_kept_and_empty_ones_none() -> None:
    row = {"prompt": "Why?", "responses": ["A", "B", "", "C", "A"], "scores": [3, 3, 5, 1, 2]}
    assert read_pair(row, 4) == PreferencePair([USER], answer("A"), answer("C"), (), (3.0, 1.0))
    without = {"prompt": "Why?", "responses": ["A", "B", "C"], "scores": [3, None, 1]}
    assert read_pair(without, 4) == PreferencePair([USER], answer("A"), answer("C"), (), (3.0, 1.0))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Why?", "responses": ["A", "B"], "scores": [1, 1]}, "no two responses of different scores"),
        ({"prompt": "Why?", "responses": ["A", " "]}, "no two different responses"),
        ({"prompt": "Why?", "responses": ["A", "B"], "scores": [None, None]}, "no two responses of different scores"),
        (
            {"prompt": "Why?", "completions": [{"response": text, "overall_score": None} for text in "AB"]},
            "no two responses of different scores",
        ),
        ({"prompt": " ", "responses": ["A", "B"]}, "empty prompt"),
        ({"instruction": "Why?", "completions": []}, "no two different responses"),
        ({"prompt": "Why?", "responses": ["A", None]}, "no two different responses"),
    ],
)
def test_lists_that_rank_nothing_are_left_out(row: dict[str, Any], reason: str) -> None:
    assert read_pair(row) == reason


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"responses": ["A", "B"]}, "needs a column 'prompt' or 'instruction'"),
        ({"prompt": "Why?", "responses": "A"}, "must be a list, not str"),
        ({"prompt": "Why?", "responses": ["A", "B"], "scores": [1]}, "1 scores for 2 responses"),
        ({"prompt": "Why?", "responses": ["A", "B"], "scores": ["low", "high"]}, "scores must be numbers"),
        ({"prompt": "Why?", "responses": ["A", "B"], "scores": 5}, "scores must be a list, not int"),
        (
            {"prompt": "Why?", "completions": [{"response": "A", "rating": 1}]},
            "have no score or rank, under none of the names",
        ),
        ({"prompt": "Why?", "responses": ["A", 7]}, "a text or an assistant's message, not 7"),
    ],
)
def test_lists_in_no_known_form_are_errors(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        read_pair(row)


def test_pairs_bring_their_scores_where_both_have_one() -> None:
    row = {"prompt": "Why?", "chosen": "Because.", "rejected": "Dunno."}
    assert read_pair({**row, "score_chosen": 8, "score_rejected": "3.5"}) == PreferencePair(
        [USER], [GOOD], [BAD], scores=(8.0, 3.5)
    )
    assert read_pair({**row, "score_chosen": 8, "score_rejected": None}) == PAIR
