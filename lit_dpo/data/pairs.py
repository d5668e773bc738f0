"""A row in any of the field's formats ──► a ``PreferencePair``, or the reason why not.

Four formats are read, by what the row holds:

- message lists that repeat the prompt, as in UltraFeedback binarized:
  ``{"chosen": [user, assistant], "rejected": [user, assistant]}``, with or without ``prompt``;
- plain strings: ``{"prompt": str, "chosen": str, "rejected": str}``;
- conversational: ``{"prompt": [messages], "chosen": [assistant], "rejected": [assistant]}``;
- ranked lists: ``{"prompt": ..., "responses": [...], "scores": [...]}``, or without ``scores`` from best to worst; and
  the original UltraFeedback, ``{"instruction": str, "completions": [{"response": str, "overall_score": float}, ...]}``.

The data's own scores come along: of a pair ``score_chosen`` and ``score_rejected``. Of a ranked list only one response
of each score is kept, the first: which of two equals is better, nobody said.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
# Of UltraFeedback's completions the mean of four ratings, before the one number that was read wrongly for some of them
SCORE_NAMES = ("fine-grained_score", "overall_score", "score")


class RowError(ValueError):
    """The row is in none of the formats that are read: the data set, not one answer in it, is wrong."""


@dataclass(frozen=True)
class PreferencePair:
    """A prompt and two responses to it, or a ranked list of more, as chat messages."""

    prompt: list[Message]
    chosen: Message
    rejected: Message
    between: tuple[Message, ...] = ()  # of a ranked list what lies between best and worst, in order
    scores: tuple[float, ...] = ()  # the data's own, from best to worst; empty where it has none


def read_pair(row: Mapping[str, Any], max_responses: int = 2) -> PreferencePair | str:
    """Reads one row.

    Args:
        row: The row.
        max_responses: Most responses that are taken of a ranked list: the best, the worst, and evenly spread others.

    Returns:
        The pair, or the reason to leave it out: ``"empty prompt"``, ``"empty response"``, ``"identical responses"``,
        ``"more than one answer turn"``, ``"no two different responses"`` or ``"no two responses of different scores"``.

    Raises:
        RowError: If the row is in none of the formats.
    """
    missing = [key for key in ("chosen", "rejected") if key not in row]
    if len(missing) == 2 and ("completions" in row or "responses" in row):
        return _read_list(row, max_responses)
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
    scores = tuple(_number(row.get(f"score_{name}")) for name in ("chosen", "rejected"))
    known = not any(math.isnan(score) for score in scores)
    return PreferencePair(turns, chosen_turns[0], rejected_turns[0], scores=scores if known else ())


def _read_list(row: Mapping[str, Any], max_responses: int) -> PreferencePair | str:
    """Reads a row with a list of responses."""
    listed = row["completions"] if "completions" in row else row["responses"]
    prompt = _decoded(row.get("prompt", row.get("instruction")))
    if prompt is None:
        raise RowError("a list of responses needs a column 'prompt' or 'instruction'")
    if not isinstance(listed, list):
        raise RowError(f"the responses must be a list, not {type(listed).__name__}")
    answers = [_answer(response) for response in listed]
    if not listed:
        return "no two different responses"
    column = row.get("scores")
    if not isinstance(column, list | None):
        raise RowError(f"the scores must be a list, not {type(column).__name__}")
    scores = [_number(score) for score in (column or _scores(listed))]
    if "completions" in row and not any(name in (entry or ()) for entry in listed for name in SCORE_NAMES):
        raise RowError(f"the completions have no score, under none of the names {', '.join(SCORE_NAMES)}")
    if column and any(score is not None and math.isnan(_number(score)) for score in column):
        raise RowError(f"the scores must be numbers, not {column!r:.80}")
    if len(scores) != len(answers):
        raise RowError(f"there are {len(scores)} scores for {len(answers)} responses")
    turns = _messages(prompt, "prompt")
    if not turns or not _has_text(turns[-1]):
        return "empty prompt"
    scored = bool(column) or "completions" in row or not all(math.isnan(score) for score in scores)
    order = range(len(answers))
    if scored:
        order = sorted((i for i in order if not math.isnan(scores[i])), key=lambda i: -scores[i])  # type: ignore[assignment]
    kept: list[int] = []
    for index in order:
        if not _has_text(answers[index]) or any(answers[index] == answers[other] for other in kept):
            continue
        if not (scored and kept and scores[index] == scores[kept[-1]]):
            kept.append(index)
    if len(kept) < 2:
        return "no two responses of different scores" if scored else "no two different responses"
    kept = _spread(kept, max_responses)
    best, *between, worst = (answers[index] for index in kept)
    return PreferencePair(turns, best, worst, tuple(between), tuple(scores[index] for index in kept) if scored else ())


def _answer(response: Any) -> Message:
    """One response of a list, as a message: a text, a message, a list of one, or an entry with a ``response``."""
    if isinstance(response, list) and len(response) == 1:
        (response,) = response
    if isinstance(response, Mapping) and "response" in response:
        response = response["response"]
    if response is None:
        response = ""
    if isinstance(response, str):
        return {"role": "assistant", "content": response}
    if isinstance(response, Mapping) and response.get("role") == "assistant":
        return _messages([response], "responses")[0]
    raise RowError(f"a response must be a text or an assistant's message, not {response!r:.80}")


def _scores(responses: Sequence[Any]) -> list[Any]:
    """The scores that the entries of a list of responses carry, all under the one name that most of them have."""
    entries = [response if isinstance(response, Mapping) else {} for response in responses]

    def number(name: str) -> int:
        return sum(not math.isnan(_number(entry.get(name))) for entry in entries)

    best = max(SCORE_NAMES, key=number)
    return [entry.get(best) for entry in entries]


def _number(value: Any) -> float:
    """A number, NaN for anything that is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _spread(items: Sequence[int], most: int) -> list[int]:
    """At most so many items: the first, the last, and evenly spread others."""
    number = min(most, len(items))
    return [items[round(place * (len(items) - 1) / (number - 1))] for place in range(number)]


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
