"""A row in a common format ──► a ``PreferencePair``, or the reason to leave it out. One file per family of formats.

The first family in ``FORMATS`` whose ``matches`` accepts a row reads it. To add a family, write a file with ``matches``
and ``read``, and add it to ``FORMATS``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypeAlias

from lit_dpo.data.formats import (
    alpaca,
    chosen_rejected,
    openai,
    ranked_list,
    rejected_response,
    sharegpt,
    transcript,
    two_responses,
)
from lit_dpo.data.formats.context import PROMPT, tools_of
from lit_dpo.data.formats.messages import parsed, without_nulls
from lit_dpo.data.formats.pair import Message, PreferencePair, Row, RowError, make_pair

__all__ = ["FORMATS", "Format", "Message", "PreferencePair", "Reader", "Reading", "RowError"]

MultiTurn: TypeAlias = Literal["drop", "answers"]
# Columns that would change what is trained. If no family reads such a column, the row cannot be read.
MEANINGFUL = frozenset(
    {"system", "system_prompt", "system_message", "tools", "functions", "history", "chat_template_kwargs"}
    | {"context", "input", "documents", "weight", "weights", "sample_weight"}
    | {"image", "images", "image_url", "image_path", "pixel_values", "video", "videos", "audio", "audios"}
)


class Format(NamedTuple):
    """A family of formats: its name, a test whether a row has such a format, and a reader."""

    name: str
    matches: Callable[[Row], bool]
    read: Callable[[Row, int], PreferencePair | str]


FORMATS = (
    Format("OpenAI preferences", openai.matches, openai.read),
    Format("two responses and a label", two_responses.matches, two_responses.read),
    Format("messages and a rejected response", rejected_response.matches, rejected_response.read),
    Format("HH-RLHF transcripts", transcript.matches, transcript.read),
    Format("ShareGPT", sharegpt.matches, sharegpt.read),
    Format("Alpaca", alpaca.matches, alpaca.read),
    Format("chosen and rejected", chosen_rejected.matches, chosen_rejected.read),
    Format("ranked list", ranked_list.matches, ranked_list.read),
)


class Reading(NamedTuple):
    """What became of a row."""

    format: str  # name of its family
    result: PreferencePair | str  # the pair, or the reason to leave the row out
    unread: tuple[str, ...]  # columns with a value that were not read
    scores: tuple[float, ...] = ()  # from best to worst response, also of a row that is left out
    group: str = ""  # value of the column to group by


@dataclass(frozen=True)
class Reader:
    """Reads rows of any known format.

    Args:
        columns: Names of columns: from the name that a format knows to the name in the data.
        ignore: Columns that are left out although they could change what is trained.
        system: System message of every prompt, instead of one in the data; None leaves the data's. An empty text
            removes it.
        max_responses: Maximum number of responses to take from a ranked list: the best, the worst, and others evenly
            spaced by rank.
        multi_turn: What to do with responses of several messages: ``drop`` leaves the row out, ``answers`` trains on
            the assistant's messages in them.
        pretemplated: Whether ``prompt``, ``chosen`` and ``rejected`` are rendered texts, to be taken as they are.
        group_by: Name of a column whose values group the pairs in an evaluation.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    ignore: Sequence[str] = ()
    system: str | None = None
    max_responses: int = 2
    multi_turn: MultiTurn = "drop"
    pretemplated: bool = False
    group_by: str | None = None

    def __call__(self, columns: Mapping[str, Any]) -> Reading:
        """Reads one row.

        Raises:
            RowError: If no family of formats accepts the row, if a value in it has the wrong type, or if it has a
                column of ``MEANINGFUL`` that nothing reads.
        """
        row = self._row(columns)
        families = [Format("rendered texts", lambda row: True, _as_it_is)] if self.pretemplated else FORMATS
        family = next((family for family in families if family.matches(row)), None)
        if family is None:
            raise RowError(
                f"no column 'chosen', and no other known format; the columns are {sorted(row)}. If they have names of "
                "their own, set data.columns={prompt: NAME, chosen: NAME, rejected: NAME}"
            )
        result = family.read(row, self.max_responses)
        if isinstance(result, PreferencePair):
            result = self._complete(row, result)
        if isinstance(result, PreferencePair) and not _is_unicode(result):
            raise RowError("a text holds half of a surrogate pair, which is no character")
        scores = result.scores if isinstance(result, PreferencePair) else chosen_rejected.scores_of(row)
        unread = {name: value for name, value in row.unread().items() if value not in ("", [], {})}
        group = "" if self.group_by is None else unread.pop(self.group_by, columns.get(self.group_by))
        if isinstance(result, PreferencePair) and (unsafe := sorted(_unsafe(unread, result))):
            raise RowError(
                f"{' and '.join(map(repr, unsafe))} could change what is trained, but {family.name} does not read it. "
                f"To leave it out on purpose, set data.ignore={unsafe}"
            )
        return Reading(family.name, result, (*unread, *sorted(row.nested)), scores, "" if group is None else str(group))

    def _row(self, columns: Mapping[str, Any]) -> Row:
        """The row under the names that formats know, without the columns to ignore."""
        missing = sorted(set(self.columns.values()) - columns.keys())
        if missing:
            raise RowError(f"data.columns names {', '.join(map(repr, missing))}, but the columns are {sorted(columns)}")
        known = {theirs: ours for ours, theirs in self.columns.items()}
        # A column whose name another one takes is kept under a name of its own, to be told of.
        renamed = {name: f"{name} (replaced by data.columns)" for name in self.columns if name not in known} | known
        return Row({renamed.get(name, name): columns[name] for name in columns if name not in self.ignore})

    def _complete(self, row: Row, pair: PreferencePair) -> PreferencePair | str:
        """Adds tools, template arguments and the system message, and decides about responses of several messages."""
        if self.pretemplated:
            if self.system is not None:
                raise RowError("data.system cannot be added to rendered texts (data.pretemplated=true)")
            return pair
        tools = next((tools_of(row[name]) for name in ("tools", "functions") if name in row), pair.tools)
        given = parsed(row["chat_template_kwargs"]) if "chat_template_kwargs" in row else {}
        if not isinstance(given, Mapping):
            raise RowError(f"'chat_template_kwargs' must be a dict, not {type(given).__name__}")
        prompt = pair.prompt
        if self.system is not None:
            spoken = [turn for turn in prompt if turn["role"] != "system"]
            prompt = [{"role": "system", "content": self.system}, *spoken] if self.system else spoken
        if self.multi_turn == "drop" and any(len(response) > 1 for response in pair.responses):
            return "more than one answer turn"
        return replace(pair, prompt=prompt, tools=tools, template_kwargs=without_nulls(given))


def _is_unicode(pair: PreferencePair) -> bool:
    """Whether all texts can be encoded as UTF-8."""
    turns = (*pair.prompt, *(turn for response in pair.responses for turn in response))
    try:
        "".join(str(turn["content"]) for turn in turns).encode()
    except UnicodeEncodeError:
        return False
    return True


def _unsafe(unread: Mapping[str, Any], pair: PreferencePair) -> set[str]:
    """Columns that were not read and could change what is trained: by name, or a second text beside the prompt."""
    turns = (*pair.prompt, *(turn for response in pair.responses for turn in response))
    said = "\n".join(str(turn["content"]) for turn in turns)
    texts = {name for name in PROMPT if isinstance(unread.get(name), str) and unread[name].strip() not in said}
    return texts | (MEANINGFUL & unread.keys())


def _as_it_is(row: Row, max_responses: int) -> PreferencePair | str:
    """Reads rendered texts."""
    texts = [row[name] if name in row.columns else None for name in ("prompt", "chosen", "rejected")]
    if not all(isinstance(text, str) for text in texts):
        raise RowError("data.pretemplated=true takes texts in the columns prompt, chosen and rejected")
    prompt, *answers = texts
    return make_pair([{"role": "user", "content": prompt}], [[{"role": "assistant", "content": a}] for a in answers])
