"""What comes before the responses: system message, earlier turns and the question, from the columns that hold them."""

import json
from collections.abc import Mapping
from typing import Any

from lit_dpo.data.formats.messages import messages, parsed, without_nulls
from lit_dpo.data.formats.pair import Message, Row, RowError

SYSTEM = ("system", "system_prompt")
PROMPT = ("prompt", "conversations", "conversation", "messages", "question", "query", "instruction", "context", "input")


def prompt_column(row: Row) -> str | None:
    """The first column of ``PROMPT`` that the row has. In SHP, the prompt is a text in ``history``."""
    found = next((name for name in PROMPT if name in row and str(row.columns[name]).strip()), None)
    return "history" if found is None and isinstance(row.columns.get("history"), str) else found


def with_context(row: Row, turns: list[Message]) -> list[Message]:
    """Puts the row's history and system message before some turns.

    Raises:
        RowError: If the turns begin with another system message than that of the row's column.
    """
    opening = turns[:1] if turns and turns[0]["role"] == "system" else []
    turns = [*opening, *history(row), *turns[len(opening) :]]
    column = next((name for name in SYSTEM if name in row), None)
    text = "" if column is None else row[column]
    if not isinstance(text, str):
        raise RowError(f"{column!r} must be a text, not {type(text).__name__}")
    if not text.strip():
        return turns
    if turns and turns[0]["role"] == "system":
        if turns[0]["content"] != text:
            raise RowError(f"the column {column!r} and the first message are two different system messages")
        return turns
    return [{"role": "system", "content": text}, *turns]


def history(row: Row) -> list[Message]:
    """The turns of a column ``history``: messages, or pairs of a question and an answer.

    Raises:
        RowError: If it holds something else.
    """
    if "history" not in row or isinstance(parsed(row.columns["history"]), str):
        return []
    earlier: Any = parsed(row["history"])
    if isinstance(earlier, list) and all(isinstance(turn, Mapping) for turn in earlier):
        return messages(earlier, "history")
    turns: list[Message] = []
    for turn in earlier if isinstance(earlier, list) else [None]:
        if not isinstance(turn, list | tuple) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise RowError(f"'history' must be a list of messages or of [question, answer], not {earlier!r:.80}")
        turns += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return turns


def tools_of(value: Any) -> list[Any]:
    """The schemas of tools: a list, or JSON text of one. Nulls, which columnar files add, are removed.

    Raises:
        RowError: If the value is something else.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else []
        except json.JSONDecodeError as error:
            raise RowError(f"the tools are not JSON: {value!r:.80}") from error
    if not isinstance(value, list | None):
        raise RowError(f"the tools must be a list of schemas, not {type(value).__name__}")
    return list(without_nulls(value or []))
