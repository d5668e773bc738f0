"""Pairs and prompts that are nearly the same, found by MinHash.

Token ids are cut into runs of ``RUN`` tokens. The similarity of two texts is the share of the runs of either that both
have (Jaccard). Runs that more than half of all prompts have come from the chat template and do not count.

References:
    Broder 1997, "On the resemblance and containment of documents" (MinHash).
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from lit_dpo.data.pairs import PairDataset

RUN = 5  # tokens
PERMUTATIONS = 128  # the standard error of a similarity is at most 1/√128 / 2 = 0.044
SAMPLE = 1000  # prompts that are looked at for runs of the chat template
FEWEST = 20  # of them, below which nothing is taken for the template's
CHUNK = 1000  # pairs that are read at once


def near_duplicates(pairs: PairDataset, threshold: float, progress_bar: bool = False) -> np.ndarray:
    """Pairs whose prompt, chosen and rejected response are nearly those of an earlier pair that is none itself.

    Args:
        pairs: The pairs.
        threshold: Least similarity of two pairs, in (0, 1].
        progress_bar: Whether to show a progress bar.

    Returns:
        Which pairs, (P,) bool.
    """
    seen = _Seen(threshold)
    template = _template_runs(pairs)
    found = np.zeros(len(pairs), bool)
    rows = _runs_of(pairs, "prompt", "chosen", "rejected")
    bar = tqdm(rows, "Near duplicates", len(pairs), unit="pair", disable=not progress_bar)
    for index, parts in enumerate(bar):
        # A swapped pair contradicts, it does not repeat: each part has hashes of its own.
        salted = [_without(part, template) * np.uint64(2 * number + 1) for number, part in enumerate(parts)]
        found[index] = seen.has(np.concatenate(salted), add=True)
    return found


def near_prompts(pairs: PairDataset, others: PairDataset, threshold: float, progress_bar: bool = False) -> np.ndarray:
    """Pairs whose prompt is nearly one of those of other pairs.

    Args:
        pairs: The pairs.
        others: The other pairs.
        threshold: Least similarity of two prompts, in (0, 1].
        progress_bar: Whether to show a progress bar.

    Returns:
        Which pairs, (P,) bool.
    """
    seen = _Seen(threshold)
    template = _template_runs(pairs)
    for (prompt,) in _runs_of(others, "prompt"):
        seen.has(_without(prompt, template), add=True)
    rows = _runs_of(pairs, "prompt")
    bar = tqdm(rows, "Near leaks", len(pairs), unit="pair", disable=not progress_bar)
    return np.array([seen.has(_without(prompt, template)) for (prompt,) in bar], bool)


class _Seen:
    """The sets of runs that have been seen, for a lookup of similar ones."""

    def __init__(self, threshold: float) -> None:
        try:
            from datasketch import MinHash, MinHashLSH  # type: ignore[import-untyped]
        except ImportError as error:
            raise ImportError(
                "data.filters.near_duplicates needs the package datasketch: pip install 'lit_dpo[near-duplicates]'"
            ) from error
        self.threshold = threshold
        self._first: Any = MinHash(PERMUTATIONS, hashfunc=int)
        self._lookup: Any = MinHashLSH(min(threshold, 0.9), PERMUTATIONS)  # above, it knows too few bands
        self._known: list[Any] = []

    def has(self, runs: np.ndarray, add: bool = False) -> bool:
        """Whether a similar set has been seen. With ``add``, a set that is new is kept."""
        sketch = self._first.copy()
        sketch.update_batch((np.unique(runs) >> np.uint64(32)).tolist())
        similar = (self._known[number] for number in self._lookup.query(sketch))
        if any(one.jaccard(sketch) >= self.threshold for one in similar):
            return True
        if add:
            self._lookup.insert(len(self._known), sketch)
            self._known.append(sketch)
        return False


def _runs_of(pairs: PairDataset, *names: str) -> Iterator[list[np.ndarray]]:
    """Hashes of the runs of tokens in some columns of each pair."""
    indices = np.asarray(pairs.indices, np.int64)
    columns = pairs.columns.select_columns(list(names)).with_format("arrow")  # reads only the rows that are asked for
    for start in range(0, len(indices), CHUNK):
        table = columns[indices[start : start + CHUNK].tolist()]
        for row in zip(*(column.combine_chunks() for column in table.columns), strict=True):
            yield [_hashes(np.asarray(ids.values)) for ids in row]


def _hashes(ids: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each run of ``RUN`` tokens; of all tokens together if there are fewer."""
    if len(ids) == 0:
        return np.zeros(0, np.uint64)
    runs = np.lib.stride_tricks.sliding_window_view(ids.astype(np.uint64), min(RUN, len(ids)))
    total = np.zeros(len(runs), np.uint64)
    for column in runs.T:
        total = (total ^ (column + np.uint64(1))) * np.uint64(0x9E3779B97F4A7C15)
        total ^= total >> np.uint64(29)
    return total


def _template_runs(pairs: PairDataset) -> np.ndarray:
    """Runs that more than half of the prompts have, in a sample of different prompts."""
    _, first = np.unique(pairs.digests("prompt_key"), return_index=True)
    mask = np.zeros(len(pairs), bool)
    mask[np.sort(first)[:SAMPLE]] = True
    sample = [np.unique(prompt) for (prompt,) in _runs_of(pairs.select(mask), "prompt")]
    if len(sample) < FEWEST:
        return np.zeros(0, np.uint64)
    runs, count = np.unique(np.concatenate(sample), return_counts=True)
    return runs[count > len(sample) / 2]


def _without(runs: np.ndarray, template: np.ndarray) -> np.ndarray:
    return runs[~np.isin(runs, template)]
