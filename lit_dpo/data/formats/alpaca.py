"""Rows in the format of Alpaca: an ``instruction``, perhaps with an ``input``, ``history`` and ``system``.

- ``{"instruction": str, "input": str, "chosen": str, "rejected": str}``;
- ``{"instruction": str, "input": str, "output": [better, worse]}``.
"""

from lit_dpo.data.formats import chosen_rejected
from lit_dpo.data.formats.context import with_context
from lit_dpo.data.formats.messages import answer, parsed
from lit_dpo.data.formats.pair import PreferencePair, Row, RowError, make_pair


def matches(row: Row) -> bool:
    """Whether the row has an instruction, and an input or a list of outputs."""
    responses = "output" in row.columns or chosen_rejected.matches(row)
    return "instruction" in row.columns and responses and ("input" in row.columns or "output" in row.columns)


def read(row: Row, max_responses: int = 2) -> PreferencePair | str:
    """Reads one row into a pair, or returns the reason to leave it out.

    Raises:
        RowError: If instruction or input are no texts, or if there are not two outputs.
    """
    texts = [row[name] for name in ("instruction", "input") if name in row]
    if not all(isinstance(text, str) for text in texts):
        raise RowError("'instruction' and 'input' must be texts")
    question = "\n".join(text for text in texts if text.strip())
    if "output" not in row.columns:
        return chosen_rejected.read_two(row, *chosen_rejected.columns(row), question)
    outputs = parsed(row["output"])
    if not isinstance(outputs, list) or len(outputs) != 2:
        raise RowError("'output' must be a list of two responses, the better one first")
    turns = with_context(row, [{"role": "user", "content": question}])
    return make_pair(turns, [answer(output, "output") for output in outputs])
