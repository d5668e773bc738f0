"""The common result of all formats, the columns of a row, and the error for a row that cannot be read."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

Message: TypeAlias = dict[str, Any]


class RowError(ValueError):
    """The row cannot be read as what it is. This points to a wrong data set or setting, not to one bad answer."""


class Row(Mapping[str, Any]):
    """The columns of a row. Notes which of them were read, so that no column is dropped without a word.

    Args:
        columns: Names and values of the columns; kept as an attribute, for a look that does not count as reading.
    """

    def __init__(self, columns: Mapping[str, Any]) -> None:
        self.columns = columns
        self.read: set[str] = set()
        self.nested: set[str] = set()  # keys inside columns that were not read, as "completions.model"

    def __getitem__(self, name: str) -> Any:
        value = self.columns[name]
        self.read.add(name)
        return value

    def __contains__(self, name: object) -> bool:
        """Whether there is such a column with a value: a columnar file fills absent values with nulls."""
        return self.columns.get(name) is not None  # type: ignore[call-overload]

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __len__(self) -> int:
        return len(self.columns)

    def unread(self) -> dict[str, Any]:
        """The columns with a value that were not read."""
        return {name: self.columns[name] for name in self if name not in self.read and name in self}


@dataclass(frozen=True)
class PreferencePair:
    """A prompt with two responses, or with a ranked list of more, as chat messages.

    Attributes:
        prompt: The messages before the responses.
        chosen: The best response: one assistant message, or several messages of which assistant messages are trained.
        rejected: The worst response, likewise.
        between: The other responses of a ranked list, from better to worst.
        scores: The data's scores, from best to worst response; empty if it has none.
        tools: Schemas of the tools that the chat template describes; empty if there are none.
        template_kwargs: Arguments of the row to the chat template.
    """

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    between: tuple[list[Message], ...] = ()
    scores: tuple[float, ...] = ()
    tools: list[Any] = field(default_factory=list)
    template_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def responses(self) -> tuple[list[Message], ...]:
        """All responses, from best to worst."""
        return (self.chosen, *self.between, self.rejected)


def has_text(message: Message) -> bool:
    """Whether a message has content that is not blank, or calls a tool."""
    return bool(str(message["content"]).strip()) or bool(message.get("tool_calls"))


def make_pair(
    prompt: list[Message],
    responses: Sequence[list[Message]],
    scores: Sequence[float] = (),
    tools: Sequence[Any] = (),
) -> PreferencePair | str:
    """A pair of a prompt and of responses from best to worst, or the reason to leave it out."""
    if not prompt or not has_text(prompt[-1]):
        return "empty prompt"
    if any(not response or not has_text(response[-1]) for response in responses):
        return "empty response"
    if any(response[-1]["role"] != "assistant" for response in responses):
        return "no answer at the end"
    if any(response[0]["role"] != "assistant" for response in responses):
        return "conversations part before an answer"
    chosen, *between, rejected = responses
    if chosen == rejected:
        return "identical responses"
    return PreferencePair(prompt, chosen, rejected, tuple(between), tuple(scores), list(tools))
