"""Rows in the format of OpenAI's and Azure's preference fine-tuning.

``{"input": {"messages": […], "tools": […]}, "preferred_output": [assistant], "non_preferred_output": [assistant]}``
"""

from lit_dpo.data.formats.context import tools_of, with_context
from lit_dpo.data.formats.messages import answer, messages, parsed
from lit_dpo.data.formats.pair import PreferencePair, Row, RowError, make_pair

NAMES = ("preferred_output", "non_preferred_output")
HARMLESS = {"messages", "tools", "parallel_tool_calls"}


def matches(row: Row) -> bool:
    """Whether the row has an input, and a preferred output."""
    return "input" in row.columns and any(name in row.columns for name in NAMES)


def read(row: Row, max_responses: int = 2) -> PreferencePair | str:
    """Reads one row into a pair, or returns the reason to leave it out.

    Raises:
        RowError: If the input has no messages, or has something that is not read.
    """
    for name in NAMES:
        if name not in row.columns:
            raise RowError(f"no column {name!r}; the columns are {sorted(row)}")
    given = parsed(row["input"])
    if not isinstance(given, dict) or "messages" not in given:
        raise RowError("'input' must have 'messages'")
    unread = sorted(name for name, value in given.items() if value is not None and name not in HARMLESS)
    if unread:
        raise RowError(f"'input' has {', '.join(unread)}, which is not read. Remove it from the data")
    turns = with_context(row, messages(given["messages"], "input.messages"))
    return make_pair(turns, [answer(row[name], name) for name in NAMES], tools=tools_of(given.get("tools")))
