"""Rows with a chosen and a rejected response, under one of the names in ``NAMES``.

- message lists that repeat the prompt, as in UltraFeedback binarized:
  ``{"chosen": [user, assistant], "rejected": [user, assistant]}``, with or without a column for the prompt;
- strings: ``{"prompt": str, "chosen": str, "rejected": str}``;
- conversational: ``{"prompt": [messages], "chosen": [assistant], "rejected": [assistant]}``;
- single messages: ``{"messages": [messages], "chosen": assistant, "rejected": assistant}``.

The columns in ``SCORES``, if present, are the scores of the responses.
"""

import math

from lit_dpo.data.formats.context import PROMPT, prompt_column, with_context
from lit_dpo.data.formats.messages import answer, decoded, is_transcript, messages, number
from lit_dpo.data.formats.pair import Message, PreferencePair, Row, RowError, make_pair

NAMES = (
    ("chosen", "rejected"),
    ("chosen_response", "rejected_response"),
    ("chosen_conversations", "rejected_conversations"),
    ("answer_chosen", "answer_rejected"),
    ("preferred", "dispreferred"),
)
SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("rating_chosen", "rating_rejected"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_avg_rating", "rejected_avg_rating"),
)


def matches(row: Row) -> bool:
    """Whether the row has a column for the chosen or for the rejected response."""
    return any(name in row.columns for names in NAMES for name in names)


def read(row: Row, max_responses: int = 2) -> PreferencePair | str:
    """Reads one row into a pair, or returns the reason to leave it out.

    Raises:
        RowError: If a column is missing, or a value is neither text nor messages.
    """
    return read_two(row, *columns(row))


def columns(row: Row) -> tuple[str, str]:
    """Names of the columns of the chosen and of the rejected response.

    Raises:
        RowError: If the row has only one of them.
    """
    there = [pair for pair in NAMES if any(name in row.columns for name in pair)]
    names = next((pair for pair in there if all(name in row for name in pair)), there[0])
    for name in names:
        if name not in row.columns:
            raise RowError(f"no column {name!r}; the columns are {sorted(row)}")
    return names


def read_two(row: Row, better: str, worse: str, question: str | None = None) -> PreferencePair | str:
    """Reads a pair from the columns of two responses and from those of what comes before them.

    Args:
        row: The row.
        better: Column of the better response.
        worse: Column of the worse response.
        question: Text of the last user turn, if it is in none of the columns of a prompt.

    Raises:
        RowError: If the responses have different types, or if nothing says where the prompt ends.
    """
    chosen, rejected = (decoded(row[name]) for name in (better, worse))
    if chosen is None or rejected is None:
        return "empty response"
    if all(isinstance(value, list) and all(isinstance(v, str) for v in value) for value in (chosen, rejected)):
        return "more than one answer turn" if chosen and rejected else "empty response"
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise RowError(f"{better!r} and {worse!r} must both be strings or both be lists of messages")
    responses = [answer(chosen, better), answer(rejected, worse)]
    if not all(responses):
        return "empty response"
    column = None if question is not None else prompt_column(row)
    value = question if column is None else decoded(row.columns[column])
    if isinstance(chosen, str) and not is_transcript(chosen):
        if value is None and any(name in row.columns for name in PROMPT):
            return "empty prompt"
        if value is None:
            raise RowError(
                f"{better!r} is a string, so a column 'prompt' is needed. If it has another name, set "
                "data.columns={prompt: NAME}"
            )
    whole = not isinstance(chosen, str) and responses[0][0]["role"] != "assistant"
    try:
        lead = [] if value is None else messages(value, column or "prompt")
        if column is not None:
            row.read.add(column)
    except RowError:
        if not whole:
            raise
        lead = []  # the responses' messages hold the prompt, and the column is something else
    turns, responses = _apart(lead, column or "prompt", *responses)
    return make_pair(with_context(row, turns), responses, scores_of(row))


def _apart(
    lead: list[Message], column: str, chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[list[Message]]]:
    """Splits responses that may repeat the prompt into the prompt and what differs.

    Args:
        lead: Messages of the column of the prompt.
        column: Name of this column.
        chosen: Messages of the chosen response, perhaps with those of the prompt before them.
        rejected: Messages of the rejected response, likewise.

    Raises:
        RowError: If the responses begin with another prompt than that of the column.
    """
    limit = min(len(chosen), len(rejected)) - 1  # the last message of each is its answer
    shared = next((turn for turn in range(limit) if not _same(chosen[turn], rejected[turn])), limit)
    responses = [chosen[shared:], rejected[shared:]]
    if chosen[0]["role"] == "assistant":
        return [*lead, *chosen[:shared]], responses
    system = [turn for turn in lead if turn["role"] == "system"]
    spoken = [turn for turn in lead if turn["role"] != "system"]
    opening = [turn for turn in chosen if turn["role"] != "system"]
    # The column may hold the first messages, or the text of one user turn.
    is_one = len(spoken) == 1 and any(_same(spoken[0], turn) for turn in opening)
    if not is_one and not (len(opening) >= len(spoken) and all(map(_same, spoken, opening))):
        raise RowError(
            f"the messages of the responses do not begin with the prompt in {column!r}. If that column is something "
            f"else, set data.ignore=[{column}]"
        )
    if chosen[0]["role"] != "system":
        return [*system, *chosen[:shared]], responses
    if system and not _same(system[0], chosen[0]):
        raise RowError(f"{column!r} and the responses begin with two different system messages")
    return chosen[:shared], responses


def _same(one: Message, other: Message) -> bool:
    """Whether two messages say the same. An id of a message, or blanks around its text, make no difference."""
    first, second = ((turn["role"], str(turn["content"]).strip(), turn.get("tool_calls")) for turn in (one, other))
    return first == second


def scores_of(row: Row) -> tuple[float, ...]:
    """The scores of both responses; empty if one of them has none."""
    for names in SCORES:
        if all(name in row for name in names):
            scores = tuple(number(row[name]) for name in names)
            return () if any(math.isnan(score) for score in scores) else scores
    return ()
