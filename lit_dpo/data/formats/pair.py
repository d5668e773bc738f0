"""The common result of all formats, and the error for a row that cannot be read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

Message: TypeAlias = dict[str, Any]
Row: TypeAlias = Mapping[str, Any]


class RowError(ValueError):
    """The row has no known format. This points to a wrong data set, not to one bad answer, so it is an error."""


@dataclass(frozen=True)
class PreferencePair:
    """A prompt with two responses, or with a ranked list of more, as chat messages."""

    prompt: list[Message]
    chosen: Message
    rejected: Message
    between: tuple[Message, ...] = ()  # the other responses of a ranked list, from better to worse
    scores: tuple[float, ...] = ()  # the data's scores, from best to worst response; empty if it has none
