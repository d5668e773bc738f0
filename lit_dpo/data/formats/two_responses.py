"""Rows with two responses in no order, and a label or a signed preference that says which one is better.

- HelpSteer: ``response1``, ``response2``, ``overall_preference`` (negative: the first one); in HelpSteer 2 the label
  is ``preference_strength``;
- WebGPT comparisons: ``answer_0``, ``answer_1``, ``score_0``, ``score_1``;
- PKU-SafeRLHF: ``response_0``, ``response_1``, ``better_response_id`` (0 or 1);
- Chatbot Arena: ``response_a``, ``response_b`` or ``conversation_a``, ``conversation_b``, and ``winner_model_a``,
  ``winner_model_b``, ``winner_tie`` or ``winner`` (``model_a``, ``model_b``, ``tie``);
- SHP: ``human_ref_A``, ``human_ref_B``, ``labels`` (1: the first one), with the post in ``history``;
- Stack Exchange paired: ``response_j`` is better than ``response_k``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from lit_dpo.data.formats.chosen_rejected import read_two
from lit_dpo.data.formats.messages import number, parsed
from lit_dpo.data.formats.pair import PreferencePair, Row, RowError

WINNERS = {"a": 1, "model_a": 1, "response_a": 1, "b": -1, "model_b": -1, "response_b": -1}


class Scheme(NamedTuple):
    """Columns of the two responses, columns of the label, and which response the label prefers."""

    responses: tuple[str, str]
    labels: tuple[str, ...]
    preference: Callable[..., float]  # positive: the first response, negative: the second, 0: tied, NaN: unknown


def _signed(value: Any) -> float:
    return -number(value)


def _second_if_one(value: Any) -> float:
    return {0.0: 1.0, 1.0: -1.0}.get(number(value), float("nan"))


def _first_if_one(value: Any) -> float:
    return -_second_if_one(value)


def _flags(first: Any, second: Any) -> float:
    return number(first) - number(second)


def _named(value: Any) -> float:
    name = str(value).lower()
    return 0.0 if name.startswith(("tie", "both")) else float(WINNERS.get(name, "nan"))


SCHEMES = (
    Scheme(("response1", "response2"), ("overall_preference",), _signed),
    Scheme(("response_1", "response_2"), ("overall_preference",), _signed),
    Scheme(("response_1", "response_2"), ("preference_strength",), _signed),
    Scheme(("answer_0", "answer_1"), ("score_0", "score_1"), _flags),
    Scheme(("response_0", "response_1"), ("better_response_id",), _second_if_one),
    Scheme(("response_a", "response_b"), ("winner_model_a", "winner_model_b"), _flags),
    Scheme(("response_a", "response_b"), ("winner",), _named),
    Scheme(("conversation_a", "conversation_b"), ("winner",), _named),
    Scheme(("human_ref_A", "human_ref_B"), ("labels",), _first_if_one),
    Scheme(("response_j", "response_k"), (), lambda: 1.0),
)


def matches(row: Row) -> bool:
    """Whether the row has the columns of one of the schemes."""
    return _scheme(row) is not None


def read(row: Row, max_responses: int = 2) -> PreferencePair | str:
    """Reads one row into a pair, or returns the reason to leave it out.

    Raises:
        RowError: If the label says nothing that is known.
    """
    scheme = _scheme(row)
    assert scheme is not None
    labels = [row[name] for name in scheme.labels]
    if any(label is None for label in labels):
        return "no label"
    preference = scheme.preference(*labels)
    if preference != preference:  # NaN
        told = ", ".join(f"{name}={label!r}" for name, label in zip(scheme.labels, labels, strict=True))
        raise RowError(f"the label says of neither response that it is better: {told}")
    if preference == 0:
        return "tied"
    if scheme.responses[0] == "response_a":
        texts = {name: _texts(row.columns.get(name)) for name in ("prompt", *scheme.responses)}
        if any(text is not None and len(text) > 1 for text in texts.values()):
            return "more than one answer turn"
        arena = Row({**row.columns, **{name: text[0] for name, text in texts.items() if text}})
        arena.read = row.read  # what is read of it counts
        row = arena
    first, second = scheme.responses
    return read_two(row, *((first, second) if preference > 0 else (second, first)))


def _scheme(row: Row) -> Scheme | None:
    """The first scheme whose columns the row has."""
    return next((s for s in SCHEMES if all(name in row.columns for name in (*s.responses, *s.labels))), None)


def _texts(value: Any) -> list[str | None] | None:
    """The texts of all turns, as Chatbot Arena holds them: JSON text of a list; None for anything else."""
    found = parsed(value)
    return found if isinstance(found, list) and found and all(isinstance(text, str | None) for text in found) else None
