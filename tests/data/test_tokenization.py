from typing import Any

import pytest

from lit_dpo.data.encoding import Encoder
from lit_dpo.data.formats import Message, PreferencePair
from lit_dpo.data.rendering import ChatTemplate
from lit_dpo.data.tokenization import TokenizedPair, Truncation, tokenize
from tests.tiny import CHATML, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
USER = {"role": "user", "content": "the cat?"}


def answer(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]


def pair(chosen: str = "sat on a mat", rejected: str = "ran away") -> PreferencePair:
    return PreferencePair([USER], answer(chosen), answer(rejected))


def tokenized(pair: PreferencePair, tokenizer: Any = TOKENIZER, **options: Any) -> TokenizedPair:
    return tokenize(ChatTemplate(tokenizer, **options)(pair), Encoder(tokenizer), pair.scores)


def test_parts_join_to_the_rendered_conversation() -> None:
    result = tokenized(pair())
    assert TOKENIZER.decode(result.prompt) == "<|im_start|>user\nthe cat?<|im_end|>\n<|im_start|>assistant\n"
    assert TOKENIZER.decode(result.chosen) == "sat on a mat<|im_end|>\n"
    assert TOKENIZER.decode(result.rejected) == "ran away<|im_end|>\n"


def test_special_tokens_are_there_once() -> None:
    result = tokenized(pair())
    assert result.chosen.count(TOKENIZER.eos_token_id) == 1
    assert result.prompt.count(TOKENIZER.convert_tokens_to_ids("<|im_start|>")) == 2


def test_a_token_across_the_boundary_is_parted() -> None:
    tokenizer = tiny_tokenizer()
    # The prompt ends in the middle of a word, and the whole text would merge across it.
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    shared = PreferencePair([{"role": "user", "content": "a m"}], answer("at and"), answer("ill"))
    result = tokenized(shared, tokenizer)
    assert tokenizer.decode(result.prompt) == "a m"
    assert tokenizer.decode(result.chosen) == "at and<|im_end|>", "EOS where the template writes none"
    assert tokenizer.decode(result.rejected) == "ill<|im_end|>"


def test_a_template_that_opens_the_answer_otherwise_when_it_generates() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML.replace(
        "<|im_start|>assistant\n{% endif", "<|im_start|>assistant\n<think>\n{% endif"
    )
    result = tokenized(pair(), tokenizer)
    assert tokenizer.decode(result.prompt).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(result.chosen) == "sat on a mat<|im_end|>\n"


def test_a_template_that_rewrites_the_prompt_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML.replace(
        "message['content'] }}", "(message['content'] if loop.last else message['content'].upper()) }}"
    )
    with pytest.raises(ValueError, match="does not begin with the rendered prompt"):
        tokenized(pair(), tokenizer)


def test_a_system_message_that_only_a_last_user_turn_gets_is_in_the_prompt() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (  # as in Mistral 0.3
        "{% for m in messages %}{% if m['role'] == 'user' %}[INST] "
        "{% if loop.last and messages[0]['role'] == 'system' %}"
        "{{ messages[0]['content'] }}\n\n{% endif %}{{ m['content'] }}[/INST]"
        "{% elif m['role'] == 'assistant' %} {{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
    )
    prompt = [{"role": "system", "content": "in april"}, USER]
    result = tokenized(PreferencePair(prompt, answer("sat on a mat"), answer("ran")), tokenizer)
    assert tokenizer.decode(result.prompt) == "[INST] in april\n\nthe cat?[/INST]"
    assert tokenizer.decode(result.chosen) == " sat on a mat<|im_end|>"
    assert tokenizer.decode(result.rejected) == " ran<|im_end|>"


UNCUT = TokenizedPair([1, 2, 3, 4], [5, 6, 7, 8, 9], [5, 6, 10], "here", 3)


@pytest.mark.parametrize(
    ("truncation", "prompt", "chosen", "rejected"),
    [
        (Truncation(None), [1, 2, 3, 4], [5, 6, 7, 8, 9], [5, 6, 10]),
        (Truncation(8), [1, 2, 3, 4], [5, 6, 7, 8], [5, 6, 10]),
        (Truncation(None, max_prompt_length=2), [3, 4], [5, 6, 7, 8, 9], [5, 6, 10]),
        (Truncation(5, max_prompt_length=2), [3, 4], [5, 6, 7], [5, 6, 10]),
        (Truncation(None, max_response_length=4), [1, 2, 3, 4], [5, 6, 7, 8], [5, 6, 10]),
    ],
)
def test_truncation_keeps_the_prompts_end_and_the_responses_beginnings(
    truncation: Truncation, prompt: list[int], chosen: list[int], rejected: list[int]
) -> None:
    assert truncation(UNCUT) == TokenizedPair(prompt, chosen, rejected, "here", 3)


@pytest.mark.parametrize(
    ("truncation", "reason"),
    [
        (Truncation(4), "prompt leaves no room for a response"),
        (Truncation(6), "identical after truncation"),
        (Truncation(8, overlong="drop"), "longer than allowed"),
        (Truncation(9, max_prompt_length=3, overlong="drop"), "longer than allowed"),
    ],
)
def test_a_pair_that_cannot_be_cut_gives_its_reason(truncation: Truncation, reason: str) -> None:
    assert truncation(UNCUT) == reason


@pytest.mark.parametrize("name", ["max_length", "max_prompt_length", "max_response_length"])
def test_a_length_below_one_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"data.{name}"):
        Truncation(**{name: 0})
