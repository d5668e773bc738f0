"""Tokenized pairs ──► those that are left out for what they are beside others: duplicates, contradictions, leaks."""

from typing import NamedTuple

import numpy as np

from lit_dpo.data.filters import LEAKED, NEAR_DUPLICATE, NEARLY_LEAKED, Action, Filters
from lit_dpo.data.near import near_duplicates, near_prompts
from lit_dpo.data.pairs import PairDataset


class Finding(NamedTuple):
    """Pairs that were found for what they are beside others."""

    what: str
    action: Action
    source: str  # names of all sources
    total: int  # number of pairs that were looked at
    rows: np.ndarray  # their row numbers in the columns
    first: str  # source and row of the first

    def __str__(self) -> str:
        verb = "left out " if self.action == "drop" else ""
        return f"{self.source}: {verb}{len(self.rows)} of {self.total} pairs: {self.what} (first: {self.first})"


def leave_out(pairs: PairDataset, filters: Filters, progress_bar: bool = False) -> tuple[PairDataset, list[Finding]]:
    """Leaves out pairs for what they are beside others, such as duplicates. Also returns what was found.

    Args:
        pairs: The pairs.
        filters: What to leave out.
        progress_bar: Whether to show a progress bar.

    Raises:
        ValueError: If no pair is left.
    """
    findings: list[Finding] = []
    left = np.ones(len(pairs), bool)
    for what, (action, found) in filters.of_set(pairs.digests("key"), pairs.digests("swapped_key")).items():
        findings += _findings(pairs, what, found & left, action)  # each pair is left out, and counted, once
        left &= ~found | (action == "keep")
    if not left.any():
        raise ValueError("\n".join([f"{pairs.source}: no usable pair is left.", *map(str, findings)]))
    pairs = pairs.select(left)
    if filters.near_duplicates is not None:
        near = near_duplicates(pairs, filters.near_duplicates, progress_bar)
        findings += _findings(pairs, NEAR_DUPLICATE, near, "drop")
        pairs = pairs.select(~near)
    return pairs, findings


def leave_out_leaks(
    pairs: PairDataset, held_out: PairDataset, filters: Filters, progress_bar: bool = False
) -> tuple[PairDataset, list[Finding]]:
    """Leaves out training pairs whose prompt is held out. Also returns what was found.

    Args:
        pairs: The training pairs.
        held_out: The held-out pairs.
        filters: What to leave out.
        progress_bar: Whether to show a progress bar.

    Raises:
        ValueError: If no pair is left.
    """
    leaked = np.isin(pairs.digests("prompt_key"), held_out.digests("prompt_key"))
    findings = _findings(pairs, LEAKED, leaked, filters.leaks)
    if filters.near_duplicates is not None:
        near = near_prompts(pairs, held_out, filters.near_duplicates, progress_bar) & ~leaked
        findings += _findings(pairs, NEARLY_LEAKED, near, filters.leaks)
        leaked |= near
    if filters.leaks == "keep":
        return pairs, findings
    if leaked.all():
        raise ValueError(f"{pairs.source}: every prompt is also held out. Hold out other pairs (data.val_size).")
    return pairs.select(~leaked), findings


def _findings(pairs: PairDataset, what: str, found: np.ndarray, action: Action) -> list[Finding]:
    """A finding about some of the pairs, (P,) bool; none if there are none."""
    if not found.any():
        return []
    source, _, first = pairs.place(int(found.argmax())).rpartition(", ")
    first = first if len(pairs.parts) == 1 else f"{source}, {first}"
    return [Finding(what, action, pairs.source, len(pairs), np.asarray(pairs.indices)[found], first)]
