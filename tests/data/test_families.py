"""Rows as people have them, in every family of formats: what is read, what is left out, and what stops the run."""

import json
from typing import Any

import pytest

from lit_dpo.data.formats import FORMATS, PreferencePair, Reader, Reading, RowError

QUESTION, GOOD, BAD = "How deep is the lake?", "About 40 metres.", "Lakes are wet."
USER, SYSTEM = {"role": "user", "content": QUESTION}, {"role": "system", "content": "Be brief."}
EARLIER = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi."}]


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


def spoken(*turns: str) -> str:
    return "".join(f"\n\n{('Human', 'Assistant')[number % 2]}: {turn}" for number, turn in enumerate(turns))


ANSWERS = {"chosen": GOOD, "rejected": BAD}
ROWS: list[tuple[str, dict[str, Any], list[Any]]] = [  # family, row, prompt
    ("ShareGPT", {"conversations": [human(QUESTION)], "chosen": gpt(GOOD), "rejected": gpt(BAD)}, [USER]),
    ("ShareGPT", {"conversations": [human(QUESTION)], "chosen": [gpt(GOOD)], "rejected": [gpt(BAD)]}, [USER]),
    ("ShareGPT", {"chosen": [human(QUESTION), gpt(GOOD)], "rejected": [human(QUESTION), gpt(BAD)]}, [USER]),
    (
        "ShareGPT",
        {
            "conversations": [{"from": "system", "value": "Be brief."}, human("Hello."), gpt("Hi."), human(QUESTION)],
            "chosen": {**gpt(GOOD), "weight": None},
            "rejected": gpt(BAD),
        },
        [SYSTEM, *EARLIER, USER],
    ),
    ("Alpaca", {"instruction": "Answer.", "input": QUESTION, **ANSWERS}, [{**USER, "content": f"Answer.\n{QUESTION}"}]),
    ("Alpaca", {"instruction": QUESTION, "input": None, "output": [GOOD, BAD]}, [USER]),
    ("Alpaca", {"instruction": QUESTION, "output": json.dumps([says(GOOD), says(BAD)])}, [USER]),
    (
        "Alpaca",
        {"instruction": QUESTION, "input": " ", "system": "Be brief.", "history": [["Hello.", "Hi."]], **ANSWERS},
        [SYSTEM, *EARLIER, USER],
    ),
    ("HH-RLHF transcripts", {"chosen": spoken(QUESTION, GOOD), "rejected": spoken(QUESTION, BAD)}, [USER]),
    (
        "HH-RLHF transcripts",
        {"chosen": spoken("Hello.", "Hi.", QUESTION, GOOD), "rejected": spoken("Hello.", "Hi.", QUESTION, BAD)},
        [*EARLIER, USER],
    ),
    (
        "HH-RLHF transcripts",
        {name: f"\n\nHuman: How deep\n\nHuman: is it?\n\nAssistant:{text}" for name, text in ANSWERS.items()},
        [{"role": "user", "content": "How deep\n\nis it?"}],
    ),
    (
        "OpenAI preferences",
        {
            "input": {"messages": [SYSTEM, USER], "tools": None, "parallel_tool_calls": True},
            "preferred_output": [says(GOOD)],
            "non_preferred_output": [says(BAD)],
        },
        [SYSTEM, USER],
    ),
    (
        "OpenAI preferences",
        {
            "input": json.dumps({"messages": [USER]}),
            "preferred_output": json.dumps([says(GOOD)]),
            "non_preferred_output": json.dumps([says(BAD)]),
        },
        [USER],
    ),
    (
        "two responses and a label",
        {"context": [USER], "response1": GOOD, "response2": BAD, "overall_preference": -3},
        [USER],
    ),
    (
        "two responses and a label",
        {"prompt": QUESTION, "response_0": BAD, "response_1": GOOD, "better_response_id": 1, "safer_response_id": 0},
        [USER],
    ),
    (
        "two responses and a label",
        {"prompt": QUESTION, "response_a": GOOD, "response_b": BAD, "winner_model_a": 1, "winner_model_b": 0},
        [USER],
    ),
    (
        "two responses and a label",
        {"conversation_a": [USER, says(BAD)], "conversation_b": [USER, says(GOOD)], "winner": "model_b"},
        [USER],
    ),
    ("two responses and a label", {"history": QUESTION, "human_ref_A": GOOD, "human_ref_B": BAD, "labels": 1}, [USER]),
    ("two responses and a label", {"history": QUESTION, "human_ref_A": BAD, "human_ref_B": GOOD, "labels": 0}, [USER]),
    (
        "two responses and a label",
        {
            "prompt": json.dumps([QUESTION]),
            "response_a": json.dumps([BAD]),
            "response_b": json.dumps([GOOD]),
            "winner_model_a": 0,
            "winner_model_b": 1,
            "winner_tie": 0,
        },
        [USER],
    ),
    (
        "two responses and a label",
        {"prompt": QUESTION, "response_1": BAD, "response_2": GOOD, "preference_strength": 2, "split": "train"},
        [USER],
    ),
    (
        "two responses and a label",
        {
            "question": {"full_text": QUESTION, "dataset": "eli5"},
            "answer_0": GOOD,
            "answer_1": BAD,
            "score_0": 0.3,
            "score_1": -0.3,
        },
        [USER],
    ),
    ("two responses and a label", {"question": QUESTION, "response_j": GOOD, "response_k": BAD}, [USER]),
    ("messages and a rejected response", {"messages": [USER, says(GOOD)], "rejected_response": BAD}, [USER]),
    (
        "messages and a rejected response",
        {"messages": [SYSTEM, USER, says(GOOD)], "rejected_response": [says(BAD)]},
        [SYSTEM, USER],
    ),
    ("chosen and rejected", {"system": "Be brief.", "question": QUESTION, **ANSWERS}, [SYSTEM, USER]),
    ("chosen and rejected", {"system_prompt": "Be brief.", "prompt": [SYSTEM, USER], **ANSWERS}, None),
    ("chosen and rejected", {"messages": [SYSTEM, USER], "chosen": says(GOOD), "rejected": says(BAD)}, [SYSTEM, USER]),
    (
        "chosen and rejected",
        {"prompt": [SYSTEM, USER], "chosen": [USER, says(GOOD)], "rejected": [USER, says(BAD)]},
        [SYSTEM, USER],
    ),
    (
        "chosen and rejected",
        {"chosen_conversations": [USER, says(GOOD)], "rejected_conversations": [USER, says(BAD)]},
        [USER],
    ),
    ("chosen and rejected", {"instruction": QUESTION, "chosen_response": GOOD, "rejected_response": BAD}, [USER]),
    (
        "chosen and rejected",
        {"prompt": str([USER]), "chosen": str([says(GOOD)]), "rejected": str([says(BAD)])},  # as pandas writes a CSV
        [USER],
    ),
    (
        "chosen and rejected",
        {
            "prompt": [{"role": "user", "content": [{"type": "text", "text": QUESTION, "image_url": None}]}],
            "chosen": [{"role": "assistant", "content": [{"type": "text", "text": GOOD}]}],
            "rejected": [{"role": "assistant", "content": [{"type": "text", "text": BAD}]}],
        },
        [USER],
    ),
    ("chosen and rejected", {"system": "", "input": QUESTION, **ANSWERS, "rating": [9, 2]}, [USER]),
    (  # the conversation in a form of its own beside the two that are compared
        "chosen and rejected",
        {
            "conversation": [{"input": QUESTION, "output": GOOD}],
            "chosen": [USER, says(GOOD)],
            "rejected": [USER, says(BAD)],
        },
        [USER],
    ),
    (
        "ranked list",
        {"prompt": spoken(QUESTION, ""), "answers": [{"answer": BAD, "rank": 1}, {"answer": GOOD, "rank": 0}]},
        [USER],
    ),
    (
        "ranked list",
        {
            "context": [USER],
            "completions": [{"rank": 2, "completion": [says(BAD)]}, {"rank": 1, "completion": [says(GOOD)]}],
        },
        [USER],
    ),
]


@pytest.mark.parametrize(("family", "row", "prompt"), ROWS)
def test_the_row_is_read_as_what_it_is(family: str, row: dict[str, Any], prompt: Any) -> None:
    reading = Reader()(row)
    assert reading.format == family
    assert isinstance(reading.result, PreferencePair)
    if prompt is None:  # the same system message twice
        prompt = [SYSTEM, USER]
    assert reading.result.prompt == prompt
    assert (reading.result.chosen, reading.result.rejected) == ([says(GOOD)], [says(BAD)])


def test_every_family_is_tried() -> None:
    assert {family for family, _, _ in ROWS} == {family.name for family in FORMATS}


TWO = {"prompt": QUESTION, "response1": GOOD, "response2": BAD}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**TWO, "overall_preference": 0}, "tied"),
        ({**TWO, "overall_preference": None}, "no label"),
        (
            {
                "prompt": '["a", "b"]',
                "response_a": '["c", "d"]',
                "response_b": '["e", "f"]',
                "winner_model_a": 1,
                "winner_model_b": 0,
            },
            "more than one answer turn",
        ),
        ({"prompt": QUESTION, "response_a": GOOD, "response_b": BAD, "winner": "tie (bothbad)"}, "tied"),
        ({"chosen": spoken(QUESTION, GOOD), "rejected": spoken("Why?", BAD)}, "empty prompt"),
        (
            {"chosen": spoken("Hello.", "Hi.", QUESTION, GOOD), "rejected": spoken("Hello.", "Ho.", QUESTION, BAD)},
            "more than one answer turn",
        ),
        ({"chosen": spoken("a", "b", QUESTION), "rejected": spoken("a", "b", "c", BAD)}, "no answer at the end"),
        (
            {"chosen": spoken("a", "b", QUESTION, GOOD), "rejected": spoken("a", "b", "c", BAD)},
            "conversations part before an answer",
        ),
        ({"prompt": None, **ANSWERS}, "empty prompt"),
        ({"instruction": "", "input": "", **ANSWERS}, "empty prompt"),
        ({"messages": None, "rejected_response": BAD}, "empty prompt"),
    ],
)
def test_what_ranks_nothing_is_left_out(row: dict[str, Any], reason: str) -> None:
    assert Reader()(row).result == reason


PLAIN = {"prompt": QUESTION, **ANSWERS}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**PLAIN, "image": {"path": "a.png"}}, r"'image' could change what is trained.*data\.ignore=\['image'\]"),
        ({**PLAIN, "images": ["a.png"], "weight": 0.5}, "'images' and 'weight'"),
        ({**PLAIN, "context": "Of a document."}, "'context'"),
        ({"prompt": 5, "chosen": 6, "rejected": 7}, "must be a string or a list"),
        ({"prompt": QUESTION, "chosen": [None], "rejected": [says(BAD)]}, "needs 'role' and 'content'"),
        ({"prompt": [[QUESTION]], **ANSWERS}, "needs 'role' and 'content'"),
        ({"prompt": {"text": QUESTION}, **ANSWERS}, "needs 'role' and 'content'"),
        ({"prompt": QUESTION, "responses": {"a": GOOD}}, "must be a list, not dict"),
        (
            {"prompt": QUESTION, "chosen": [{"role": "assistant", "content": {"a": 1}}], "rejected": BAD},
            "strings or both",
        ),
        ({**PLAIN, "history": "Earlier."}, "'history'"),
        ({**PLAIN, "system": 3}, "'system' must be a text"),
        ({**PLAIN, "system": "Be kind.", "prompt": [SYSTEM, USER]}, "two different system messages"),
        ({**PLAIN, "history": [["Hello."]]}, "'history' must be"),
        ({**PLAIN, "tools": "boil"}, "tools are not JSON"),
        ({**PLAIN, "chat_template_kwargs": "thinking"}, "must be a dict"),
        ({"chosen": f"{QUESTION} {GOOD}", "rejected": f"{QUESTION} {BAD}"}, r"a column 'prompt'.*data\.columns"),
        ({"question": QUESTION, "answer": GOOD}, r"no other known format.*data\.columns"),
        ({**TWO, "overall_preference": "left"}, "overall_preference='left'"),
        ({"prompt": QUESTION, "response_0": GOOD, "response_1": BAD, "better_response_id": 7}, "better_response_id=7"),
        ({"instruction": QUESTION, "output": [GOOD]}, "two responses"),
        ({"input": {"messages": [USER], "seed": 1}, "preferred_output": GOOD, "non_preferred_output": BAD}, "seed"),
        ({**PLAIN, "chosen": [{**says(GOOD), "weight": 0}], "rejected": [says(BAD)]}, "'weight', which is not read"),
        (
            {**PLAIN, "prompt": [{"role": "user", "content": [{"type": "image_url", "image_url": "a.png"}]}]},
            "part that is no text",
        ),
    ],
)
def test_what_would_change_the_training_stops_the_run_by_name(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        Reader()(row)


@pytest.mark.parametrize(
    "text", ['["Paris"]', '["Paris", "Rome"]', '{"a": 1}', "{'a', 'b'}", "[1, 2]", '[{"a": 1}]', '["",' + "[" * 5000]
)
def test_a_text_that_is_json_stays_a_text(text: str) -> None:
    for row in ({"prompt": text, **ANSWERS}, {"prompt": QUESTION, "responses": [text, BAD]}):
        assert isinstance(Reader()(row).result, PreferencePair)
    result = Reader()({"prompt": text, "chosen": text, "rejected": BAD}).result
    assert isinstance(result, PreferencePair)
    assert (result.prompt[0]["content"], result.chosen[0]["content"]) == (text, text)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Explain.", "chosen": [USER, says(GOOD)], "rejected": [USER, says(BAD)]}, "do not begin with the"),
        (
            {
                "prompt": [{"role": "user", "content": "Hi"}],
                "chosen": [USER, says(GOOD)],
                "rejected": [USER, says(BAD)],
            },
            r"data\.ignore=\[prompt\]",
        ),
        (
            {
                "prompt": [{**SYSTEM, "content": "A"}, USER],
                "chosen": [SYSTEM, USER, says(GOOD)],
                "rejected": [SYSTEM, USER, says(BAD)],
            },
            "two different system messages",
        ),
        ({"instruction": "Translate.", "question": QUESTION, **ANSWERS}, "'instruction' could change"),
        ({**PLAIN, "prompt": [{"role": "narrator", "content": QUESTION}]}, "role 'narrator'"),
        ({**PLAIN, "prompt": [{"role": None, "content": QUESTION}]}, "role None"),
        ({**PLAIN, "chosen": [{**says(GOOD), "loss": False}], "rejected": [says(BAD)]}, "'loss', which is not read"),
        ({"prompt": QUESTION, "responses": [{"text": "a", "rating": 1}, {"text": "b", "rating": 5}]}, "have rating"),
        ({"prompt": QUESTION, "responses": ["a", "b"], "values": [0.1, 0.9]}, "whether 'values' are the scores"),
        (
            {"prompt": QUESTION, "answers": [{"answer": "a", "rank": "first"}, {"answer": "b", "rank": "second"}]},
            "ranks",
        ),
        ({**PLAIN, "chosen": "[{'content': 'a', 'role': 'user'}\n {'content': 'b'}]"}, "cannot be parsed"),
        ({**PLAIN, "chosen": [{"role": "assistant", "tool_calls": 3}], "rejected": [says(BAD)]}, "must be a list"),
    ],
)
def test_what_would_be_read_wrongly_stops_the_run(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        Reader()(row)


def test_other_names_of_ranks_calls_and_roles_are_read() -> None:
    for name, values in (("ranks", [2, 1]), ("rank", [2, 1]), ("rewards", [0.1, 0.9]), ("ratings", "[1, 2]")):
        result = Reader()({"prompt": QUESTION, "responses": [BAD, GOOD], name: values}).result
        assert isinstance(result, PreferencePair)
        assert result.chosen == [says(GOOD)]
    spoken = [{"role": "Human", "content": QUESTION}, {"role": "Assistant", "content": GOOD}]
    result = Reader()({"messages": spoken, "rejected_messages": [USER, says(BAD)]}).result
    assert isinstance(result, PreferencePair)
    assert (result.prompt, result.chosen, result.rejected) == ([USER], [says(GOOD)], [says(BAD)])
    older = {"role": "assistant", "content": None, "function_call": {"name": "depth", "arguments": ""}}
    result = Reader()({"prompt": QUESTION, "chosen": [older], "rejected": [says(BAD)]}).result
    assert isinstance(result, PreferencePair)
    assert result.chosen[0]["tool_calls"] == [{"type": "function", "function": {"name": "depth", "arguments": {}}}]
    ordered = [SYSTEM, *EARLIER, USER]
    result = Reader()({"history": [["Hello.", "Hi."]], "prompt": [SYSTEM, USER], **ANSWERS}).result
    assert isinstance(result, PreferencePair)
    assert result.prompt == ordered


def test_rendered_texts_are_taken_as_they_are() -> None:
    reader = Reader(pretemplated=True)
    text = "\n\nHuman: q\n\nAssistant:"
    result = reader({"prompt": text, "chosen": " yes", "rejected": '["no"]'}).result
    assert isinstance(result, PreferencePair)
    assert [turns[0]["content"] for turns in (result.prompt, *result.responses)] == [text, " yes", '["no"]']
    with pytest.raises(RowError, match="'tools' could change"):
        reader({"prompt": text, "chosen": "a", "rejected": "b", "tools": [CALL]})
    with pytest.raises(RowError, match="takes texts"):
        reader({"prompt": [USER], "chosen": "a", "rejected": "b"})
    with pytest.raises(RowError, match=r"data\.system"):
        Reader(pretemplated=True, system="Be brief.")({"prompt": text, "chosen": "a", "rejected": "b"})


def test_columns_that_are_not_read_are_named() -> None:
    row = {**PLAIN, "id": 7, "source": "forum", "note": "", "image": None, "tools": []}
    assert Reader()(row) == Reading(
        "chosen and rejected", PreferencePair([USER], [says(GOOD)], [says(BAD)]), ("id", "source")
    )


def test_keys_inside_a_list_that_are_not_read_are_named() -> None:
    listed = [{"response": text, "score": score, "model": "m"} for text, score in ((GOOD, 2), (BAD, 1))]
    assert Reader()({"instruction": QUESTION, "completions": listed}).unread == ("completions.model",)


def test_a_second_prompt_beside_an_instruction_is_not_taken_for_read() -> None:
    with pytest.raises(RowError, match="'prompt' could change"):
        Reader()({"instruction": "Translate.", "input": QUESTION, "prompt": "Other.", **ANSWERS})


def test_columns_can_be_ignored_and_have_names_of_ones_own() -> None:
    reader = Reader(columns={"prompt": "asked", "chosen": "won", "rejected": "lost"}, ignore=("image",))
    result = reader({"asked": QUESTION, "won": GOOD, "lost": BAD, "image": "a.png", "prompt": "another"}).result
    assert result == PreferencePair([USER], [says(GOOD)], [says(BAD)])
    unread = reader({"asked": QUESTION, "won": GOOD, "lost": BAD, "prompt": "another"}).unread
    assert unread == ("prompt (replaced by data.columns)",)
    with pytest.raises(RowError, match=r"data\.columns names 'lost'"):
        reader({"asked": QUESTION, "won": GOOD})


def test_a_system_message_of_ones_own_replaces_that_of_the_data() -> None:
    row = {**PLAIN, "prompt": [SYSTEM, USER]}
    for system, expected in (
        ("Be kind.", [{**SYSTEM, "content": "Be kind."}, USER]),
        ("", [USER]),
        (None, [SYSTEM, USER]),
    ):
        result = Reader(system=system)(row).result
        assert isinstance(result, PreferencePair)
        assert result.prompt == expected


def test_ratings_are_scores() -> None:
    names = [
        ("chosen_rating", "rejected_rating"),
        ("score_chosen", "score_rejected"),
        ("rating_chosen", "rating_rejected"),
    ]
    for better, worse in names:
        result = Reader()({**PLAIN, better: 4.5, worse: "2"}).result
        assert isinstance(result, PreferencePair)
        assert result.scores == (4.5, 2.0)


CALL = {"type": "function", "id": "c1", "function": {"name": "depth", "arguments": '{"lake": "Como"}'}}
PARSED = {**CALL, "function": {"name": "depth", "arguments": {"lake": "Como"}}}


def test_tools_and_calls_are_read_without_the_nulls_of_arrow() -> None:
    schema = {"type": "function", "function": {"name": "depth", "parameters": {"lake": {"type": "string"}, "x": None}}}
    call = {**CALL, "function": {"name": "depth", "arguments": {"lake": "Como", "city": None}}}
    row = {
        "tools": json.dumps([schema]),
        "prompt": [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "40"},
        ],
        "chosen": [{**says(GOOD), "tool_calls": None}],
        "rejected": [says(BAD)],
    }
    result = Reader()(row).result
    assert isinstance(result, PreferencePair)
    assert result.tools == [
        {"type": "function", "function": {"name": "depth", "parameters": {"lake": {"type": "string"}}}}
    ]
    assert result.prompt[1] == {"role": "assistant", "content": "", "tool_calls": [PARSED]}
    assert result.chosen == [says(GOOD)]


def test_a_response_may_be_a_call() -> None:
    row = {"prompt": QUESTION, "chosen": [{"role": "assistant", "tool_calls": [CALL]}], "rejected": [says(BAD)]}
    result = Reader()(row).result
    assert isinstance(result, PreferencePair)
    assert result.chosen == [{"role": "assistant", "content": "", "tool_calls": [PARSED]}]
    shared = {"from": "function_call", "value": json.dumps({"name": "depth", "arguments": {"lake": "Como"}})}
    result = Reader()({"conversations": [human(QUESTION)], "chosen": shared, "rejected": gpt(BAD)}).result
    assert isinstance(result, PreferencePair)
    assert result.chosen[0]["tool_calls"][0]["function"] == PARSED["function"]


def test_responses_of_several_messages_are_left_out_or_kept_as_told() -> None:
    several = [says("One moment."), {"role": "user", "content": "Well?"}, says(GOOD)]
    row = {"prompt": [USER], "chosen": several, "rejected": [says(BAD)]}
    assert Reader()(row).result == "more than one answer turn"
    result = Reader(multi_turn="answers")(row).result
    assert isinstance(result, PreferencePair)
    assert (result.chosen, result.rejected) == (several, [says(BAD)])


def test_arguments_to_the_template_come_from_the_row() -> None:
    for given in ({"enable_thinking": False, "other": None}, '{"enable_thinking": false}'):
        result = Reader()({**PLAIN, "chat_template_kwargs": given}).result
        assert isinstance(result, PreferencePair)
        assert result.template_kwargs == {"enable_thinking": False}
