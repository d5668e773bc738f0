"""Rows with a ``chosen`` and a ``rejected`` response.

- message lists that repeat the prompt, as in UltraFeedback binarized:
  ``{"chosen": [user, assistant], "rejected": [user, assistant]}``, with or without ``prompt``;
- strings: ``{"prompt": str, "chosen": str, "rejected": str}``;
- conversational: ``{"prompt": [messages], "chosen": [assistant], "rejected": [assistant]}``.

The columns ``score_chosen`` and ``score_rejected``, if present, are the scores of the responses.
"""

import math

from lit_dpo.data.formats.messages import decoded, has_text, messages, number
from lit_dpo.data.formats.pair import Message, PreferencePair, Row, RowError


def matches(row: Row) -> bool:
    """Whether the row has a column ``chosen`` or ``rejected``."""
    return "chosen" in row or "rejected" in row


def read(row: Row, max_responses: int = 2) -> PreferencePair | str:
    """Reads one row into a pair, or returns the reason to leave it out.

    Raises:
        RowError: If a column is missing, or a value is neither text nor messages.
    """
    for column in ("chosen", "rejected"):
        if column not in row:
            raise RowError(f"no column {column!r}; the columns are {sorted(row)}")
    chosen, rejected, prompt = (decoded(row.get(key)) for key in ("chosen", "rejected", "prompt"))

    if chosen is None or rejected is None:
        return "empty response"
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise RowError("'chosen' and 'rejected' must both be strings or both be lists of messages")
    if isinstance(chosen, str):
        if prompt is None:
            raise RowError("'chosen' is a string, so a column 'prompt' is needed")
        turns = messages(prompt, "prompt")
        chosen_turns = [{"role": "assistant", "content": chosen}]
        rejected_turns = [{"role": "assistant", "content": rejected}]
    else:
        chosen_all, rejected_all = messages(chosen, "chosen"), messages(rejected, "rejected")
        if not chosen_all or not rejected_all:
            return "empty response"
        lead = [] if prompt is None else messages(prompt, "prompt")
        if chosen_all[0]["role"] != "assistant" and (isinstance(prompt, str) or chosen_all[: len(lead)] == lead):
            lead = []  # the message lists repeat the prompt
        shared = _shared_turns(chosen_all, rejected_all)
        turns, chosen_turns, rejected_turns = lead + chosen_all[:shared], chosen_all[shared:], rejected_all[shared:]

    if not turns or not has_text(turns[-1]):
        return "empty prompt"
    if not all(len(answer) == 1 and answer[0]["role"] == "assistant" for answer in (chosen_turns, rejected_turns)):
        return "more than one answer turn"
    if not (has_text(chosen_turns[0]) and has_text(rejected_turns[0])):
        return "empty response"
    if chosen_turns == rejected_turns:
        return "identical responses"
    scores = tuple(number(row.get(f"score_{name}")) for name in ("chosen", "rejected"))
    known = not any(math.isnan(score) for score in scores)
    return PreferencePair(turns, chosen_turns[0], rejected_turns[0], scores=scores if known else ())


def _shared_turns(chosen: list[Message], rejected: list[Message]) -> int:
    """Number of leading turns that both have in common. The last turn of each is its answer and never counts."""
    limit = min(len(chosen), len(rejected)) - 1
    return next((turn for turn in range(limit) if chosen[turn] != rejected[turn]), limit)
