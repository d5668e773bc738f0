"""A row in a common format ──► a ``PreferencePair``, or the reason to leave it out. One file per family of formats.

The first family in ``FORMATS`` whose ``matches`` accepts a row reads it. To add a family, write a file with ``matches``
and ``read``, and add it to ``FORMATS``.
"""

from collections.abc import Callable
from typing import NamedTuple

from lit_dpo.data.formats import chosen_rejected, ranked_list
from lit_dpo.data.formats.pair import Message, PreferencePair, Row, RowError

__all__ = ["FORMATS", "Format", "Message", "PreferencePair", "RowError", "read_pair"]


class Format(NamedTuple):
    """A family of formats: its name, a test whether a row has such a format, and a reader."""

    name: str
    matches: Callable[[Row], bool]
    read: Callable[[Row, int], PreferencePair | str]


FORMATS = (
    Format("chosen and rejected", chosen_rejected.matches, chosen_rejected.read),
    Format("ranked list", ranked_list.matches, ranked_list.read),
)


def read_pair(row: Row, max_responses: int = 2) -> PreferencePair | str:
    """Reads one row.

    Args:
        row: The row.
        max_responses: Maximum number of responses to take from a ranked list: the best, the worst, and others evenly
            spaced by rank.

    Returns:
        The pair, or the reason to leave it out: ``"empty prompt"``, ``"empty response"``, ``"identical responses"``,
        ``"more than one answer turn"``, ``"no two different responses"`` or ``"no two responses of different scores"``.

    Raises:
        RowError: If no family of formats accepts the row, or if a value in the row has the wrong type.
    """
    for family in FORMATS:
        if family.matches(row):
            return family.read(row, max_responses)
    raise RowError(f"no column 'chosen'; the columns are {sorted(row)}")
