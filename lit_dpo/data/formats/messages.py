"""Reads chat messages and numbers from the values of a row."""

import ast
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from lit_dpo.data.formats.pair import Message, RowError

ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool", "function", "ipython")}
ROLES |= dict.fromkeys(("human", "prompter"), "user")
ROLES |= dict.fromkeys(("gpt", "model", "chatgpt", "bot", "ai"), "assistant")
ROLES |= {"observation": "tool", "function_response": "tool"}
TEXT_PARTS = ("text", "input_text", "output_text")
SPEAKERS = {"Human": "user", "Assistant": "assistant"}
# Keys of a message that would change what is trained, and that nothing here reads
MEANINGFUL_KEYS = ("weight", "prefix", "image", "images", "image_url", "video", "videos", "audio")
TRAINED_KEYS = ("loss", "train")  # likewise, unless they are true


def parsed(value: Any) -> Any:
    """Parses a list or a dict that a CSV file holds as text: JSON, or Python's notation. Leaves other values as is."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        for parse in (json.loads, ast.literal_eval):
            try:
                found = parse(value)
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                continue
            return found if isinstance(found, list | dict) else value
    return value


def decoded(value: Any, column: str = "") -> Any:
    """Parses messages that a CSV file holds as text. Any other text, JSON too, stays the text that it is.

    Raises:
        RowError: If the text is a list of messages that cannot be parsed.
    """
    found = parsed(value)
    if found is value or _is_message(found):
        return found
    if isinstance(found, list) and found and all(map(_is_message, found)):
        return found
    return value


def unparsed(value: Any) -> bool:
    """Whether a text looks like a list of messages, but is none that can be parsed. NumPy writes such texts."""
    return isinstance(value, str) and bool(re.match(r"\s*\[\s*\{\s*['\"](role|content|from|value)['\"]\s*:", value))


def _is_message(value: Any) -> bool:
    keys = set(value) if isinstance(value, dict) else set()
    return {"role", "content"} <= keys or {"role", "tool_calls"} <= keys or {"from", "value"} <= keys


def messages(value: Any, column: str) -> list[Message]:
    """Reads messages: a list of them, a single one, a transcript, or a text, which becomes one user message.

    Args:
        value: The value of a column.
        column: Name of the column, for messages about errors.

    Raises:
        RowError: If the value is none of these.
    """
    value = decoded(value)
    if unparsed(value):
        raise RowError(f"{column!r} looks like a list of messages, but it cannot be parsed: {value!r:.80}")
    if isinstance(value, str):
        return transcript(value) if is_transcript(value) else [{"role": "user", "content": value}]
    if isinstance(value, Mapping):
        if "full_text" in value:  # of a question in WebGPT
            return messages(value["full_text"], column)
        value = [value]
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
    if unparsed(value):
        raise RowError(f"{column!r} looks like a list of messages, but it cannot be parsed: {value!r:.80}")
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
    unread = [key for key in MEANINGFUL_KEYS if key in given]
    unread += [key for key in TRAINED_KEYS if given.get(key, True) is not True]
    if unread:
        raise RowError(f"a message of {column!r} has {unread[0]!r}, which is not read. Remove it from the data")
    if role == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": tool_calls(content)}
    if "function_call" in given:  # OpenAI's older form
        given["tool_calls"] = [given.pop("function_call")]
    if given.get("tool_calls"):
        given["tool_calls"] = tool_calls(given["tool_calls"])
    else:
        given.pop("tool_calls", None)
    known = ROLES.get(str(role).lower())
    if known is None:
        raise RowError(f"a message of {column!r} has the role {role!r}; known are {', '.join(ROLES)}")
    return {"role": known, "content": text_of(content or given.pop("refusal", None), column), **given}


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
            if part.get("type") not in TEXT_PARTS or "text" not in part:
                raise RowError(f"a message of {column!r} has a part that is no text: {part!r:.80}")
        return "".join(str(part["text"] or "") for part in content)
    raise RowError(f"the content of a message of {column!r} must be text, not {type(content).__name__}")


def tool_calls(value: Any) -> list[dict[str, Any]]:
    """The tool calls of a message: a list, a single one, or JSON text of these.

    Raises:
        RowError: If it is something else.
    """
    found = parsed(value)
    found = [found] if isinstance(found, Mapping) else found
    if not isinstance(found, list):
        raise RowError(f"the tool calls must be a list, not {found!r:.80}")
    return [tool_call(call) for call in found]


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
            arguments = json.loads(arguments or "{}")
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
    """Converts a value to a float; NaN if it is no finite number."""
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return found if math.isfinite(found) else math.nan
