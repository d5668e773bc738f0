"""Rows with a list of responses to one prompt.

- ``{"prompt": ..., "responses": [...], "scores": [...]}``; without ``scores``, responses go from best to worst;
- the original UltraFeedback: ``{"instruction": str, "completions": [{"response": str, "overall_score": float}, ...]}``;
- with ranks, the lowest the best: ``{"prompt": ..., "answers": [{"answer": str, "rank": int}, ...]}``, or
  ``{"context": ..., "completions": [{"completion": [messages], "rank": int}, ...]}``.

Of responses with equal scores or ranks, only the first is kept, because the data does not say which one is better.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lit_dpo.data.formats import chosen_rejected
from lit_dpo.data.formats.context import PROMPT, prompt_column, with_context
from lit_dpo.data.formats.messages import answer, messages, number, parsed
from lit_dpo.data.formats.pair import Message, PreferencePair, Row, RowError, has_text, make_pair

LISTS = ("completions", "responses", "answers")
TEXTS = ("response", "completion", "answer", "text")
# UltraFeedback's "fine-grained_score" is the mean of four ratings. Its "overall_score" is wrong for some completions.
MESSAGE_KEYS = ("role", "content", "from", "value", "tool_calls")
COLUMNS, RANKS = ("scores", "ratings", "rewards"), ("ranks", "rank")
SCORE_NAMES = ("fine-grained_score", "overall_score", "score")


def matches(row: Row) -> bool:
    """Whether the row has a list of responses, and neither a chosen nor a rejected one."""
    return not chosen_rejected.matches(row) and any(name in row.columns for name in LISTS)


def read(row: Row, max_responses: int = 2) -> PreferencePair | str:
    """Reads one row into a ranked list of at most ``max_responses``, or returns the reason to leave it out.

    Raises:
        RowError: If the row has no prompt, or if responses or scores are missing or have a wrong type.
    """
    name = next(name for name in LISTS if name in row.columns)
    listed = parsed(row[name])
    column = prompt_column(row)
    if column is None and not any(known in row.columns for known in PROMPT):
        raise RowError("a list of responses needs a column 'prompt' or 'instruction'")
    if not isinstance(listed, list):
        raise RowError(f"the responses must be a list, not {type(listed).__name__}")
    if column is None:
        return "empty prompt"
    answers = [_answer(response, name) for response in listed]
    if not listed:
        return "no two different responses"
    scores = _scores(row, listed, name)
    keys = {key for entry in listed if isinstance(entry, Mapping) for key in entry if entry[key] is not None}
    row.nested |= {f"{name}.{key}" for key in keys - {*TEXTS, *MESSAGE_KEYS, *SCORE_NAMES, "rank"}}
    turns = with_context(row, messages(row[column], column))
    if not turns or not has_text(turns[-1]):
        return "empty prompt"
    order = range(len(answers))
    if scores:
        order = sorted((i for i in order if not math.isnan(scores[i])), key=lambda i: -scores[i])  # type: ignore[assignment]
    kept: list[int] = []
    for index in order:
        if not (answers[index] and has_text(answers[index][-1])) or any(answers[index] == answers[k] for k in kept):
            continue
        if not (scores and kept and scores[index] == scores[kept[-1]]):
            kept.append(index)
    if len(kept) < 2:
        return "no two responses of different scores" if scores else "no two different responses"
    kept = _spread(kept, max_responses)
    ranks = any(known in row for known in RANKS)
    ranks |= any(isinstance(entry, Mapping) and entry.get("rank") is not None for entry in listed)
    return make_pair(
        turns, [answers[index] for index in kept], [scores[index] for index in kept] if scores and not ranks else []
    )


def _answer(response: Any, column: str) -> list[Message]:
    """Reads a response: a text, a message, a list of messages, or a dict with one of these under one of ``TEXTS``."""
    if isinstance(response, Mapping) and not {"role", "from"} & set(response):
        found = next((name for name in TEXTS if name in response), None)
        if found is None:
            raise RowError(f"a response must be a text or an assistant's message, not {response!r:.80}")
        response = response[found]
    if not isinstance(response, str | list | Mapping | None):
        raise RowError(f"a response must be a text or an assistant's message, not {response!r:.80}")
    return answer(response, column)


def _scores(row: Row, listed: Sequence[Any], name: str) -> list[float]:
    """A score for each response, NaN where it has none; empty if the list goes from best to worst.

    Raises:
        RowError: If scores are missing, or are no numbers.
    """
    given = next((known for known in (*COLUMNS, *RANKS) if known in row), None)
    column = None if given is None else parsed(row[given])
    if not isinstance(column, list | None):
        raise RowError(f"the scores must be a list, not {type(column).__name__}")
    if column:
        if any(score is not None and math.isnan(number(score)) for score in column):
            raise RowError(f"the scores must be numbers, not {column!r:.80}")
        if len(column) != len(listed):
            raise RowError(f"there are {len(column)} scores for {len(listed)} responses")
        return [-number(score) if given in RANKS else number(score) for score in column]
    entries = [response if isinstance(response, Mapping) else {} for response in listed]
    if any(entry.get("rank") is not None for entry in entries):
        ranks = [-number(entry.get("rank")) for entry in entries]
        if all(map(math.isnan, ranks)):
            raise RowError(f"the ranks of the {name} must be numbers")
        return ranks
    best = max(SCORE_NAMES, key=lambda known: sum(not math.isnan(number(entry.get(known))) for entry in entries))
    scores = [number(entry.get(best)) for entry in entries]
    if not all(map(math.isnan, scores)):
        return scores
    if any(known in entry for known in SCORE_NAMES for entry in entries):
        return scores
    if name != "responses":
        raise RowError(f"the {name} have no score or rank, under none of the names {', '.join((*SCORE_NAMES, 'rank'))}")
    for entry in entries:
        if unknown := sorted(set(entry) - {*TEXTS, *MESSAGE_KEYS}):
            raise RowError(f"the {name} have {', '.join(unknown)}, and nothing says which of them is best")
    for column_name, values in row.unread().items():
        numbers = (
            isinstance(values, list) and len(values) == len(listed) and not any(math.isnan(number(v)) for v in values)
        )
        if numbers:
            raise RowError(f"nothing says whether {column_name!r} are the scores of the {name}. Name it 'scores'")
    return []


def _spread(items: Sequence[int], most: int) -> list[int]:
    """At most ``most`` items: the first, the last, and evenly spaced others."""
    number = min(most, len(items))
    return [items[round(place * (len(items) - 1) / (number - 1))] for place in range(number)]
