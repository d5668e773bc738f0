"""Reads chat messages and numbers from the values of a row."""

import json
import math
from collections.abc import Mapping
from typing import Any

from lit_dpo.data.formats.pair import Message, RowError


def decoded(value: Any) -> Any:
    """Parses a list of messages that a CSV file holds as JSON text. Returns any other value unchanged."""
    if isinstance(value, str) and value.startswith("[{") and '"role"' in value:
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


def messages(value: Any, column: str) -> list[Message]:
    """Converts a string to one user message. Removes null fields, which columnar files add, from a list of messages.

    Raises:
        RowError: If the value is neither a string nor a list of messages.
    """
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise RowError(f"{column!r} must be a string or a list of messages, not {type(value).__name__}")
    for message in value:
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise RowError(f"each message of {column!r} needs 'role' and 'content', but one is {message!r:.80}")
    return [{key: item for key, item in message.items() if item is not None or key == "content"} for message in value]


def has_text(message: Message) -> bool:
    """Whether a message has content that is not blank."""
    content = message["content"]
    return bool(content.strip()) if isinstance(content, str) else bool(content)


def number(value: Any) -> float:
    """Converts a value to a float; NaN if that is not possible."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
