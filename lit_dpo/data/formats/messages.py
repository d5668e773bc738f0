"""Reads chat messages and numbers from the values of a row."""

import ast
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from lit_dpo.data.formats.pair import Message, RowError

ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "chatgpt": "assistant", "observation": "tool"}
TEXT_PARTS = ("text", "input_text", "output_text")
SPEAKERS = {"Human": "user", "Assistant": "assistant"}
# Keys of a message that would change what is trained, and that nothing here reads
MEANINGFUL_KEYS = ("weight", "image", "images", "video", "videos", "audio")


def decoded(value: Any) -> Any:
    """Parses a list or a dict that a CSV file holds as text: JSON, or Python's notation. Leaves other values as is.

    A list of one text, in which Chatbot Arena holds each text, is that text.
    """
    if isinstance(value, str) and re.match(r"\s*(\[\s*)*\{\s*['\"]", value):
        for parse in (json.loads, ast.literal_eval):
            try:
                return parse(value)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                continue
    if isinstance(value, str) and re.match(r'\s*\["', value):
        try:
            parsed = json.loads(value)
        except ValueError:
            return value
        value = parsed if all(isinstance(item, str) for item in parsed) else value
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        return value[0]
    return value


def messages(value: Any, column: str) -> list[Message]:
    """Reads messages: a list of them, a single one, a transcript, or a text, which becomes one user message.

    Args:
        value: The value of a column.
        column: Name of the column, for messages about errors.

    Raises:
        RowError: If the value is none of these.
    """
    value = decoded(value)
    if isinstance(value, str):
        return transcript(value) if is_transcript(value) else [{"role": "user", "content": value}]
    if isinstance(value, Mapping):
        value = [value["full_text"]] if set(value) >= {"full_text"} else [value]  # of a question in WebGPT
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        return messages(value[0], column)
    if not isinstance(value, list):
        raise RowError(f"{column!r} must be a string or a list of messages, not {type(value).__name__}")
    return [message(entry, column) for entry in value]


def answer(value: Any, column: str) -> list[Message]:
    """Reads a response: a text, a transcript, one message, or a list of messages.

    Raises:
        RowError: If the value is none of these.
    """
    value = decoded(value)
    if value is None:
        return []
    if isinstance(value, str) and not is_transcript(value):
        return [{"role": "assistant", "content": value}]
    return messages(value, column)


def message(entry: Any, column: str) -> Message:
    """Reads one message with ``role`` and ``content``, or with ``from`` and ``value`` as in ShareGPT.

    Nulls, which columnar files add, are removed. Text parts are joined. Arguments of tool calls are dicts.

    Raises:
        RowError: If the entry is no such message, or if it holds something else than text and tool calls.
    """
    if not isinstance(entry, Mapping) or not ({"role", "content"} <= set(entry) or {"from", "value"} <= set(entry)):
        known = isinstance(entry, Mapping) and "role" in entry and entry.get("tool_calls")
        if not known:
            raise RowError(f"each message of {column!r} needs 'role' and 'content', but one is {entry!r:.80}")
    given = without_nulls(entry)
    role, content = given.pop("role", None) or given.pop("from", None), given.pop("content", None)
    if content is None:
        content = given.pop("value", None)
    given.pop("from", None), given.pop("value", None)
    for key in MEANINGFUL_KEYS:
        if given.get(key) is not None:
            raise RowError(f"a message of {column!r} has {key!r}, which is not read. Remove it from the data")
    if role == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": [tool_call(decoded(content))]}
    if given.get("tool_calls"):
        given["tool_calls"] = [tool_call(call) for call in given["tool_calls"]]
    else:
        given.pop("tool_calls", None)
    return {"role": ROLES.get(str(role), str(role)), "content": text_of(content, column), **given}


def text_of(content: Any, column: str) -> str:
    """The text of a message's content. A list of text parts is joined.

    Raises:
        RowError: If the content holds an image or something else that is no text.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
        for part in content:
            if part.get("type") not in TEXT_PARTS:
                raise RowError(f"a message of {column!r} has a part of type {part.get('type')!r}; only text is read")
        return "".join(str(part.get("text") or "") for part in content)
    raise RowError(f"the content of a message of {column!r} must be text, not {type(content).__name__}")


def tool_call(call: Any) -> dict[str, Any]:
    """A tool call in the form of transformers' templates, with its arguments as a dict.

    Raises:
        RowError: If it names no function.
    """
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or "name" not in function:
        raise RowError(f"a tool call needs the name of a function, but one is {call!r:.80}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError as error:
            raise RowError(f"the arguments of a tool call are not JSON: {arguments!r:.80}") from error
    rest = {} if function is call else {key: value for key, value in call.items() if key != "function"}
    return {"type": "function", **rest, "function": {**function, "arguments": arguments}}


def without_nulls(value: Any) -> Any:
    """Removes nulls from dicts, at any depth. Arrow gives each struct all keys that any row has, filled with null."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def is_transcript(text: str) -> bool:
    """Whether a text is a transcript as in HH-RLHF: turns that begin with ``Human:`` and ``Assistant:``."""
    return text.startswith("\n\nHuman:") or (text.lstrip().startswith("Human:") and "\n\nAssistant:" in text)


def transcript(text: str) -> list[Message]:
    """The turns of a transcript. Successive turns of one speaker become one. An empty last turn is left out."""
    turns: list[Message] = []
    _, *parts = re.split(r"(?:^|\n\n)(Human|Assistant):", "\n\n" + text.strip())
    for speaker, spoken in zip(parts[::2], parts[1::2], strict=True):
        role, content = SPEAKERS[speaker], spoken.strip()
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] = f"{turns[-1]['content']}\n\n{content}".strip()
        else:
            turns.append({"role": role, "content": content})
    return turns[:-1] if turns and turns[-1] == {"role": "assistant", "content": ""} else turns


def number(value: Any) -> float:
    """Converts a value to a float; NaN if that is not possible."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
