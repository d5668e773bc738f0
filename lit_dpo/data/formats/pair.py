"""What every format is read into, and the error for a row that cannot be read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

Message: TypeAlias = dict[str, Any]
Row: TypeAlias = Mapping[str, Any]


class RowError(ValueError):
    """The row has no known format: the data set is wrong, not a single answer in it."""


@dataclass(frozen=True)
class PreferencePair:
    """A prompt and two responses to it, or a ranked list of more, as chat messages."""

    prompt: list[Message]
    chosen: Message
    rejected: Message
    between: tuple[Message, ...] = ()  # the other responses of a ranked list, from better to worse
    scores: tuple[float, ...] = ()  # the data's own scores, from best to worst response; empty if it has none
