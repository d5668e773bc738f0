"""A row in any of the field's formats ──► a ``PreferencePair``, or the reason why not.

Three formats are read, by what the row holds:

- message lists that repeat the prompt, as in UltraFeedback binarized:
  ``{"chosen": [user, assistant], "rejected": [user, assistant]}``, with or without ``prompt``;
- plain strings: ``{"prompt": str, "chosen": str, "rejected": str}``;
- conversational: ``{"prompt": [messages], "chosen": [assistant], "rejected": [assistant]}``.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]


class RowError(ValueError):
    """The row is in none of the formats that are read: the data set, not one answer in it, is wrong."""


@dataclass(frozen=True)
class PreferencePair:
    """A prompt and two responses to it, as chat messages."""

    prompt: list[Message]
    chosen: Message
    rejected: Message


def read_pair(row: Mapping[str, Any]) -> PreferencePair | str:
    """Reads one row.

    Returns:
        The pair, or the reason to leave it out: ``"empty prompt"``, ``"empty response"``, ``"identical responses"``
        or ``"more than one answer turn"``.

    Raises:
        RowError: If the row is in none of the formats.
    """
    missing = [key for key in ("chosen", "rejected") if key not in row]
    if missing:
        raise RowError(f"no column {missing[0]!r}; the columns are {sorted(row)}")
    chosen, rejected, prompt = (_decoded(row.get(key)) for key in ("chosen", "rejected", "prompt"))

    if chosen is None or rejected is None:
        return "empty response"
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise RowError("'chosen' and 'rejected' must both be strings or both be lists of messages")
    if isinstance(chosen, str):
        if prompt is None:
            raise RowError("'chosen' is a string, so a column 'prompt' is needed")
        turns = _messages(prompt, "prompt")
        chosen_turns = [{"role": "assistant", "content": chosen}]
        rejected_turns = [{"role": "assistant", "content": rejected}]
    else:
        chosen_all, rejected_all = _messages(chosen, "chosen"), _messages(rejected, "rejected")
        if not chosen_all or not rejected_all:
            return "empty response"
        lead = [] if prompt is None else _messages(prompt, "prompt")
        if chosen_all[0]["role"] != "assistant" and (isinstance(prompt, str) or chosen_all[: len(lead)] == lead):
            lead = []  # the lists repeat the prompt
        shared = _shared_turns(chosen_all, rejected_all)
        turns, chosen_turns, rejected_turns = lead + chosen_all[:shared], chosen_all[shared:], rejected_all[shared:]

    if not turns or not _has_text(turns[-1]):
        return "empty prompt"
    if not all(len(answer) == 1 and answer[0]["role"] == "assistant" for answer in (chosen_turns, rejected_turns)):
        return "more than one answer turn"
    if not (_has_text(chosen_turns[0]) and _has_text(rejected_turns[0])):
        return "empty response"
    if chosen_turns == rejected_turns:
        return "identical responses"
    return PreferencePair(turns, chosen_turns[0], rejected_turns[0])


def _decoded(value: Any) -> Any:
    """A list of messages that a CSV file holds as JSON text; any other value as it is."""
    if isinstance(value, str) and value.startswith("[{") and '"role"' in value:
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


def _messages(value: Any, column: str) -> list[Message]:
    """A string as one user message; a list of messages without the fields that a columnar file filled with None."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise RowError(f"{column!r} must be a string or a list of messages, not {type(value).__name__}")
    for message in value:
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise RowError(f"each message of {column!r} needs 'role' and 'content', but one is {message!r:.80}")
    return [{key: item for key, item in message.items() if item is not None or key == "content"} for message in value]


def _shared_turns(chosen: list[Message], rejected: list[Message]) -> int:
    """Number of leading turns in common, the last turn of either never counted: it is the answer."""
    limit = min(len(chosen), len(rejected)) - 1
    return next((turn for turn in range(limit) if chosen[turn] != rejected[turn]), limit)


def _has_text(message: Message) -> bool:
    content = message["content"]
    return bool(content.strip()) if isinstance(content, str) else bool(content)
