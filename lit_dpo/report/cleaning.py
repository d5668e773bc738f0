"""Training pairs and decisions on some of them ──► a cleaned set that ``fit`` reads."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lit_dpo.data.formats import PreferencePair
from lit_dpo.data.loading import Loaded, PairLoading
from lit_dpo.data.pairs import PairDataset
from lit_dpo.report.evidence import read_lines, write_lines

ACTIONS = ("keep", "flip", "drop")
Key = tuple[str, int]  # source and row of a pair


class SourceRows:
    """The rows of pairs, in one format, whatever theirs is.

    Args:
        loading: How they were read.
        loaded: What was read.
    """

    def __init__(self, loading: PairLoading, loaded: Loaded) -> None:
        self._readers = [replace(loading.reader, **source.of_rows) for source in loading.sources]
        self._rows = loaded.rows

    def read(self, part: int, number: int) -> dict[str, Any]:
        """A pair as a row with the columns ``prompt``, ``chosen`` and ``rejected``, lists of messages.

        Scores and tools are kept where the data has them. Of a ranked list, the best and the worst response are.

        Args:
            part: Number of the source.
            number: Number of the row in it.
        """
        reader = self._readers[part]
        reading = reader(self._rows[part][number])
        pair = reading.result
        assert isinstance(pair, PreferencePair), "it became a pair once"
        row: dict[str, Any] = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
        if reader.pretemplated:  # texts that are rendered already
            row = {name: messages[0]["content"] for name, messages in row.items()}
        if reader.group_by is not None and reading.group:
            row[reader.group_by] = reading.group
        if pair.scores:
            row |= {"score_chosen": pair.scores[0], "score_rejected": pair.scores[-1]}
        if pair.tools:
            row["tools"] = json.dumps(pair.tools)
        if pair.template_kwargs:
            row["chat_template_kwargs"] = pair.template_kwargs
        return row


def flipped(row: dict[str, Any]) -> dict[str, Any]:
    """A row with the other label. Its scores are left out, because they contradict it."""
    kept = {name: value for name, value in row.items() if not name.startswith("score_")}
    return {**kept, "chosen": row["rejected"], "rejected": row["chosen"]}


def read_decisions(path: Path) -> dict[Key, str]:
    """Decisions from JSON lines with ``source``, ``row`` and ``action``. What is not named is kept.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: If a line has no action, or another than keep, flip or drop, or if a pair has two.
    """
    if not path.exists():
        raise FileNotFoundError(f"--apply {path}: there is no such file.")
    found: dict[Key, str] = {}
    for number, line in enumerate(read_lines(path), 1):
        try:
            key, action = (str(line["source"]), int(line["row"])), line["action"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"--apply {path}, line {number} needs source, row and action.") from error
        if action not in ACTIONS:
            raise ValueError(f"--apply {path}, line {number}: action is {', '.join(ACTIONS)}, not {action!r}.")
        if found.get(key, action) != action:
            raise ValueError(f"--apply {path}, line {number}: {key[0]}, row {key[1]} has two different actions.")
        found[key] = action
    return found


def cleaned_rows(
    pairs: PairDataset, origins: Sequence[tuple[int, int]], rows: SourceRows, decisions: dict[Key, str]
) -> Iterator[dict[str, Any]]:
    """The rows of all pairs after the decisions.

    Args:
        pairs: The pairs.
        origins: Number of the source, and row, of each.
        rows: Reads their rows.
        decisions: What to do with some of them.

    Raises:
        ValueError: If a decision is about no pair.
    """
    names = [part.source for part in pairs.parts]
    known = {(names[part], number) for part, number in origins}
    for source, number in decisions:
        if (source, number) not in known:
            raise ValueError(f"A decision is about {source}, row {number}, which is no training pair.")
    for part, number in origins:
        action = decisions.get((names[part], number), "keep")
        if action != "drop":
            row = rows.read(part, number)
            yield flipped(row) if action == "flip" else row


def write_cleaned(pairs: PairDataset, rows: SourceRows, decisions: dict[Key, str], path: Path) -> dict[str, int]:
    """Writes the cleaned set as JSON lines. Returns how many pairs were kept, flipped and dropped."""
    origins = pairs.origins()
    write_lines(path, cleaned_rows(pairs, origins, rows, decisions))
    counts = {action: sum(one == action for one in decisions.values()) for action in ACTIONS}
    return {**counts, "keep": len(origins) - counts["flip"] - counts["drop"]}
