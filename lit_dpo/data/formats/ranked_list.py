"""Rows with a list of responses to one prompt.

- ``{"prompt": ..., "responses": [...], "scores": [...]}``; without ``scores``, responses go from best to worst;
- the original UltraFeedback: ``{"instruction": str, "completions": [{"response": str, "overall_score": float}, ...]}``.

Of responses with equal scores, only the first is kept, because the data does not say which one is better.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lit_dpo.data.formats.messages import decoded, has_text, messages, number
from lit_dpo.data.formats.pair import Message, PreferencePair, Row, RowError

# UltraFeedback's "fine-grained_score" is the mean of four ratings. Its "overall_score" is wrong for some completions.
SCORE_NAMES = ("fine-grained_score", "overall_score", "score")


def matches(row: Row) -> bool:
    """Whether the row has a list of responses, and neither ``chosen`` nor ``rejected``."""
    return not ("chosen" in row or "rejected" in row) and ("completions" in row or "responses" in row)


def read(row: Row, max_responses: int = 2) -> PreferencePair | str:
    """Reads one row into a ranked list of at most ``max_responses``, or returns the reason to leave it out.

    Raises:
        RowError: If the row has no prompt, or if responses or scores are missing or have a wrong type.
    """
    listed = row["completions"] if "completions" in row else row["responses"]
    prompt = decoded(row.get("prompt", row.get("instruction")))
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
    scores = [number(score) for score in (column or _scores(listed))]
    if "completions" in row and not any(name in (entry or ()) for entry in listed for name in SCORE_NAMES):
        raise RowError(f"the completions have no score, under none of the names {', '.join(SCORE_NAMES)}")
    if column and any(score is not None and math.isnan(number(score)) for score in column):
        raise RowError(f"the scores must be numbers, not {column!r:.80}")
    if len(scores) != len(answers):
        raise RowError(f"there are {len(scores)} scores for {len(answers)} responses")
    turns = messages(prompt, "prompt")
    if not turns or not has_text(turns[-1]):
        return "empty prompt"
    scored = bool(column) or "completions" in row or not all(math.isnan(score) for score in scores)
    order = range(len(answers))
    if scored:
        order = sorted((i for i in order if not math.isnan(scores[i])), key=lambda i: -scores[i])  # type: ignore[assignment]
    kept: list[int] = []
    for index in order:
        if not has_text(answers[index]) or any(answers[index] == answers[other] for other in kept):
            continue
        if not (scored and kept and scores[index] == scores[kept[-1]]):
            kept.append(index)
    if len(kept) < 2:
        return "no two responses of different scores" if scored else "no two different responses"
    kept = _spread(kept, max_responses)
    best, *between, worst = (answers[index] for index in kept)
    return PreferencePair(turns, best, worst, tuple(between), tuple(scores[index] for index in kept) if scored else ())


def _answer(response: Any) -> Message:
    """Converts a response to a message. It may be a string, a message, a list of one, or a dict with ``response``."""
    if isinstance(response, list) and len(response) == 1:
        (response,) = response
    if isinstance(response, Mapping) and "response" in response:
        response = response["response"]
    if response is None:
        response = ""
    if isinstance(response, str):
        return {"role": "assistant", "content": response}
    if isinstance(response, Mapping) and response.get("role") == "assistant":
        return messages([response], "responses")[0]
    raise RowError(f"a response must be a text or an assistant's message, not {response!r:.80}")


def _scores(responses: Sequence[Any]) -> list[Any]:
    """The scores stored in the responses. Of ``SCORE_NAMES``, it uses the name that most responses have."""
    entries = [response if isinstance(response, Mapping) else {} for response in responses]

    def num_scored(name: str) -> int:
        return sum(not math.isnan(number(entry.get(name))) for entry in entries)

    best = max(SCORE_NAMES, key=num_scored)
    return [entry.get(best) for entry in entries]


def _spread(items: Sequence[int], most: int) -> list[int]:
    """At most ``most`` items: the first, the last, and evenly spaced others."""
    number = min(most, len(items))
    return [items[round(place * (len(items) - 1) / (number - 1))] for place in range(number)]
