"""Rows in the format of ShareGPT: messages with ``from`` and ``value``.

``{"conversations": [{"from": "human", "value": str}, …], "chosen": {"from": "gpt", "value": str}, "rejected": …}``
"""

from typing import Any

from lit_dpo.data.formats import chosen_rejected
from lit_dpo.data.formats.messages import decoded
from lit_dpo.data.formats.pair import PreferencePair, Row


def matches(row: Row) -> bool:
    """Whether the row has a chosen and a rejected response, and messages with ``from``."""
    values = (row.columns.get(name) for name in ("conversations", "chosen", "rejected"))
    return chosen_rejected.matches(row) and any(_has_from(decoded(value)) for value in values)


def read(row: Row, max_responses: int = 2) -> PreferencePair | str:
    """Reads one row into a pair, or returns the reason to leave it out."""
    return chosen_rejected.read(row, max_responses)


def _has_from(value: Any) -> bool:
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, dict) and first.get("from") is not None
