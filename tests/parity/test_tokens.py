"""Token ids are those of TRL's ``DPOTrainer``, for conversational rows, system messages, tools and rows' arguments."""

from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset

from lit_dpo.data.encoding import Encoder
from lit_dpo.data.formats import PreferencePair, Reader
from lit_dpo.data.rendering import ChatTemplate
from lit_dpo.data.tokenization import tokenize
from tests.data.test_rendering import TOOLS
from tests.tiny import CHATML, tiny_tokenizer

USER, SYSTEM = {"role": "user", "content": "the cat?"}, {"role": "system", "content": "in april"}
SCHEMA = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"key": "value"}}}
MOOD = "{{ mood }}" + CHATML


def says(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


ANSWERS = {"chosen": [says("sat on a mat")], "rejected": [says("ran away")]}
CALLED = TOOLS.replace("ARGUMENTS", "call['function']['arguments'] | tojson")
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "one turn": (CHATML, {"prompt": [USER], **ANSWERS}),
    "several turns": (CHATML, {"prompt": [SYSTEM, USER, says("it sat"), USER], **ANSWERS}),
    "arguments of the row": (MOOD, {"prompt": [USER], **ANSWERS, "chat_template_kwargs": {"mood": "rain"}}),
    "schemas of tools": (CALLED, {"prompt": [USER], **ANSWERS, "tools": [SCHEMA]}),
    "calls in the prompt": (
        CALLED,
        {
            "prompt": [USER, {**says(""), "tool_calls": [CALL]}, {"role": "tool", "content": "a mat"}],
            **ANSWERS,
            "tools": [SCHEMA],
        },
    ),
    "a call as the response": (
        CALLED,
        {
            "prompt": [USER],
            "chosen": [{**says(""), "tool_calls": [CALL]}],
            "rejected": [says("ran away")],
            "tools": [SCHEMA],
        },
    ),
}


def ours(template: str, row: dict[str, Any]) -> tuple[list[int], list[int], list[int]]:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    pair = Reader()(row).result
    assert isinstance(pair, PreferencePair)
    tokens = tokenize(ChatTemplate(tokenizer)(pair), Encoder(tokenizer))
    return tokens.prompt, tokens.chosen, tokens.rejected


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_ids_are_those_of_trl(case: str) -> None:
    trainer_class = pytest.importorskip("trl", reason="TRL needs newer libraries than the oldest set").DPOTrainer
    template, row = CASES[case]
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    arguments = SimpleNamespace(dataset_num_proc=None, max_length=None)
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    (found,) = trainer_class._prepare_dataset(trainer, Dataset.from_list([row]), tokenizer, arguments, "rows")
    assert ours(template, row) == (found["prompt_ids"], found["chosen_ids"], found["rejected_ids"])
