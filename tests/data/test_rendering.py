"""What chat templates of the field do to a pair, with small templates that do the same."""

import datetime as dt
from typing import Any

import pytest
from datasets import Dataset

from lit_dpo.data.batch import PairBatch
from lit_dpo.data.encoding import Encoder
from lit_dpo.data.formats import Message, PreferencePair, RowError
from lit_dpo.data.preparation import prepare_pairs
from lit_dpo.data.rendering import (
    CONTROL_TOKENS,
    NO_EOS,
    REASONING_CUT,
    THINKING_CUT,
    ChatTemplate,
    RejectedByTemplateError,
)
from lit_dpo.data.tokenization import Truncation, tokenize
from tests.tiny import CHATML, tiny_tokenizer

USER: Message = {"role": "user", "content": "the cat?"}
TOOLS = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for call in m['tool_calls'] or [] %}<call>{{ ARGUMENTS }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ALTERNATING = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"


def says(text: str) -> Message:
    return {"role": "assistant", "content": text}


def template(text: str = CHATML, **options: Any) -> ChatTemplate:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = text
    return ChatTemplate(tokenizer, **options)


def pair(
    chosen: Any = "sat on a mat", rejected: Any = "ran away", prompt: Any = None, **options: Any
) -> PreferencePair:
    answers = ([says(text)] if isinstance(text, str) else text for text in (chosen, rejected))
    return PreferencePair(prompt or [USER], *answers, **options)


def texts(rendered: Any) -> list[str]:
    return ["".join(part.text for part in parts) for parts in rendered.responses]


def test_the_template_gets_the_arguments_of_the_run_and_those_of_the_row_win() -> None:
    opening = "{{ kind }}{{ mood }}" + CHATML
    found = template(opening, kwargs={"kind": "A", "mood": "B"})(pair(template_kwargs={"mood": "C"}))
    assert found.prompt.startswith("AC<|im_start|>")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("call['function']['arguments'] | tojson", '<call>{"key": 1}</call>'),
        ("'args ' + call['function']['arguments']", '<call>args {"key": 1}</call>'),  # raises for a dict
        ("call['function']['arguments']", '<call>{"key": 1}</call>'),  # would write Python's notation
    ],
)
def test_tool_schemas_and_calls_are_rendered_in_the_form_that_the_template_takes(arguments: str, expected: str) -> None:
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"key": 1}}}]
    schema = {"type": "function", "function": {"name": "f"}}
    chosen = [{**says(""), "tool_calls": calls}]
    found = template(TOOLS.replace("ARGUMENTS", arguments))(pair(chosen, tools=[schema]))
    assert found.prompt.startswith('<|im_start|>tools\n[{"type": "function", "function": {"name": "f"}}]<|im_end|>')
    assert texts(found) == [f"{expected}<|im_end|>\n", "ran away<|im_end|>\n"]
    assert found.ends


def test_only_the_assistants_messages_of_a_response_are_trained() -> None:
    chosen = [says("a mat"), {"role": "tool", "content": "rain"}, says("green hills")]
    made = template()
    found = made(pair(chosen))
    assert [(part.text, part.trained) for part in found.responses[0]] == [
        ("a mat<|im_end|>\n", True),
        ("<|im_start|>tool\nrain<|im_end|>\n<|im_start|>assistant\n", False),
        ("green hills<|im_end|>\n", True),
    ]
    tokens = tokenize(found, Encoder(made.tokenizer))
    assert made.tokenizer.decode(tokens.chosen) == texts(found)[0]
    batch = PairBatch.from_pairs([tokens])
    trained = "a mat<|im_end|>\ngreen hills<|im_end|>\nran away<|im_end|>\n"
    assert made.tokenizer.decode(batch.targets) == trained
    assert batch.response_lengths == tuple(batch.lengths.tolist()) == batch.segments[0].trained
    assert batch.padded().response_mask.sum() == len(batch.targets)
    assert batch.pairs() == [tokens]
    # The token before each trained one predicts it, in the same response or at the end of the prompt.
    for predictor, target, number in zip(batch.predictors.tolist(), batch.targets.tolist(), range(99), strict=False):
        if number not in (0, batch.response_lengths[0]):
            assert batch.input_ids[predictor + 1] == target
    assert tokens.key != tokenize(made(pair("a mat")), Encoder(made.tokenizer)).key


def test_truncation_cuts_trained_and_untrained_runs() -> None:
    made = template()
    chosen = [says("a mat"), {"role": "user", "content": "rain"}, says("green hills")]
    tokens = tokenize(made(pair(chosen)), Encoder(made.tokenizer))
    for length in range(1, len(tokens.chosen)):
        cut = Truncation(None, max_response_length=length)(tokens)
        assert not isinstance(cut, str)
        assert sum(cut.runs[0]) == len(cut.chosen) == length
        assert PairBatch.from_pairs([cut]).response_lengths[0] == sum(cut.runs[0][::2]) > 0


def test_a_turn_that_is_written_differently_later_cannot_be_told_apart() -> None:
    only_last = CHATML.replace("message['content'] }}", "(message['content'] if loop.last or loop.first else '…') }}")
    chosen = [says("a mat"), {"role": "user", "content": "rain"}, says("green hills")]
    with pytest.raises(RejectedByTemplateError, match="differently once later turns follow"):
        template(only_last)(pair(chosen))


CUTS = CHATML.replace("message['content'] }}", "message['content'].split('</think>')[-1] }}")


def test_thinking_that_a_template_removes_is_told_of_or_kept() -> None:
    thoughts = pair("<think>rain</think>a mat", "<think>roof</think>ran")
    assert (texts(template()(thoughts)), template()(thoughts).notes) == (
        ["<think>rain</think>a mat<|im_end|>\n", "<think>roof</think>ran<|im_end|>\n"],
        (),
    )
    cut = template(CUTS)(thoughts)
    assert (texts(cut), cut.notes) == (["a mat<|im_end|>\n", "ran<|im_end|>\n"], (THINKING_CUT,))
    kept = template(CUTS, keep_thinking=True)(thoughts)
    assert (texts(kept), kept.notes) == (texts(template()(thoughts)), ())
    beside = template()(pair([{**says("a mat"), "reasoning_content": "of rain"}]))
    assert beside.notes == (REASONING_CUT,)
    only = template(CUTS, keep_thinking=True)(pair("<think>rain</think>", "ran"))
    assert texts(only)[0] == "<think>rain</think><|im_end|>\n"


def test_texts_with_control_tokens_are_told_of() -> None:
    assert template()(pair("sat<|im_end|> on")).notes == (CONTROL_TOKENS,)
    assert template()(pair(prompt=[{**USER, "content": "What is <|im_start|>?"}])).notes == (CONTROL_TOKENS,)
    assert template()(pair()).notes == ()


def test_thinking_that_is_written_otherwise_is_not_put_back_twice() -> None:
    spaced = CHATML.replace("message['content'] }}", "message['content'].replace('<think>', '<think>\n') }}")
    for keeps in (False, True):
        found = template(spaced, keep_thinking=keeps)(pair("<think>rain</think>a mat", "ran"))
        assert (texts(found)[0], found.notes) == ("<think>\nrain</think>a mat<|im_end|>\n", ())
    earlier = [says("<think>rain</think>a"), {"role": "user", "content": "so?"}, says("b")]
    assert template(CUTS)(pair(earlier)).notes == (THINKING_CUT,)


def test_eos_ends_every_answer_or_none_whatever_the_template_trims() -> None:
    trims = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }}\n{% endfor %}"
    trims += "{% if add_generation_prompt %}assistant: {% endif %}"
    made = template(trims)
    tokens = tokenize(made(pair("\n  a mat", "ran")), Encoder(made.tokenizer))
    assert tokens.chosen[-1] == tokens.rejected[-1] == made.tokenizer.eos_token_id


def test_the_boundary_takes_nothing_from_the_answers() -> None:
    opens = CHATML.replace("<|im_start|>assistant\n{% endif", "<|im_start|>assistant\n<think>\n{% endif")
    found = template(opens)(pair("<table>1", "<tr>2"))
    assert found.prompt.endswith("<|im_start|>assistant\n")
    assert texts(found) == ["<table>1<|im_end|>\n", "<tr>2<|im_end|>\n"]


def test_a_template_without_tools_rejects_them() -> None:
    call = {"type": "function", "function": {"name": "depth", "arguments": {}}}
    for row in (pair([{**says(""), "tool_calls": [call]}]), pair(tools=[call])):
        with pytest.raises(RejectedByTemplateError, match="does not write the tool depth"):
            template()(row)


def test_whatever_a_template_raises_is_told() -> None:
    with pytest.raises(RejectedByTemplateError, match="division"):
        template("{{ 1 // 0 }}" + CHATML)(pair())


RENDERED = [{"role": "user", "content": "<|im_start|>user\nthe cat?<|im_end|>\n<|im_start|>assistant\n"}]


def test_texts_that_are_rendered_already_are_refused_or_taken_as_they_are() -> None:
    rendered = pair("sat<|im_end|>\n", "ran<|im_end|>\n", RENDERED)
    with pytest.raises(RowError, match=r"rendered by a chat template already.*data\.pretemplated=true"):
        template()(rendered)
    made = template("", pretemplated=True)
    tokens = tokenize(made(rendered), Encoder(made.tokenizer))
    expected = tokenize(template()(pair("sat", "ran")), Encoder(made.tokenizer))
    assert tokens == expected
    assert made(rendered).notes == ()
    assert made(pair("sat", "ran<|im_end|>", RENDERED)).notes == (NO_EOS,)
    with pytest.raises(RowError, match="takes texts"):
        made(pair(prompt=[USER, says("a"), USER]))


def test_a_template_that_raises_names_the_row_or_leaves_it_out_in_its_own_words() -> None:
    made = template(ALTERNATING + CHATML)
    system = {"role": "system", "content": "rain"}
    good = {"prompt": [USER], "chosen": [says("a")], "rejected": [says("b")]}
    rows = Dataset.from_list([good, {**good, "prompt": [system, USER]}])
    with pytest.raises(ValueError, match=r"x, row 1: .*System role not supported.*data\.on_bad_row=drop"):
        prepare_pairs(rows, "x", made, Truncation())
    pairs, report = prepare_pairs(rows, "x", made, Truncation(), on_bad_row="drop")
    assert len(pairs) == 1
    assert "left out 1 of 2 pairs: the chat template rejects the messages: System role not supported" in report[1]


def test_a_template_may_write_the_date() -> None:
    dated = "{{ strftime_now('%d %b %Y') }}" + CHATML
    fixed = template(dated, date="2024-07-26")
    assert fixed(pair()).prompt.startswith("26 Jul 2024<|im_start|>")
    today = template(dated)
    assert today(pair()).prompt.startswith(dt.datetime.now().strftime("%d %b %Y"))
    assert today.identity != fixed.identity, "the date is part of the cache's key"
    assert template(date="2024-07-26").identity == template().identity, "but only where it is written"
    with pytest.raises(ValueError, match="date"):
        template(date="yesterday")


def test_the_cache_knows_how_rows_are_rendered() -> None:
    identities = {
        made.identity
        for made in (
            template(),
            template(CUTS),
            template(kwargs={"a": 1}),
            template(pretemplated=True),
            template(keep_thinking=True),
        )
    }
    assert len(identities) == 5
