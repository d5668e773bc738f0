r"""Rows whose responses are transcripts, as in HH-RLHF.

``{"chosen": "\n\nHuman: …\n\nAssistant: …", "rejected": "\n\nHuman: …\n\nAssistant: …"}``
"""

from lit_dpo.data.formats.chosen_rejected import read_two
from lit_dpo.data.formats.messages import is_transcript
from lit_dpo.data.formats.pair import PreferencePair, Row


def matches(row: Row) -> bool:
    """Whether both responses are transcripts."""
    texts = (row.columns.get("chosen"), row.columns.get("rejected"))
    return all(isinstance(text, str) and is_transcript(text) for text in texts)


def read(row: Row, max_responses: int = 2) -> PreferencePair | str:
    """Reads one row into a pair, or returns the reason to leave it out."""
    return read_two(row, "chosen", "rejected")
