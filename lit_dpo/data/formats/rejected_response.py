"""Rows whose messages end with the chosen response: ``{"messages": [user, assistant], "rejected_response": str}``."""

from lit_dpo.data.formats.context import with_context
from lit_dpo.data.formats.messages import answer, messages
from lit_dpo.data.formats.pair import PreferencePair, Row, make_pair

NAMES = ("rejected_response", "rejected_messages")


def matches(row: Row) -> bool:
    """Whether the row has messages and a rejected response, but no chosen one."""
    rejected = any(name in row.columns for name in NAMES)
    return "messages" in row.columns and rejected and "chosen_response" not in row.columns


def read(row: Row, max_responses: int = 2) -> PreferencePair | str:
    """Reads one row into a pair, or returns the reason to leave it out."""
    if "messages" not in row:
        return "empty prompt"
    turns = messages(row["messages"], "messages")
    if "rejected_response" in row.columns:
        rejected = answer(row["rejected_response"], "rejected_response")
    else:  # of ms-swift: the whole conversation with the rejected response at its end
        rejected = messages(row["rejected_messages"], "rejected_messages")
        if rejected[:-1] != turns[:-1]:
            return "more than one answer turn"
        rejected = rejected[-1:]
    return make_pair(with_context(row, turns[:-1]), [turns[-1:], rejected])
