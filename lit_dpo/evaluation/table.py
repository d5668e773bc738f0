"""Batches of an evaluation ──► a table of the held-out pairs, gathered from all ranks."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer

from lit_dpo.training.metrics import PreferenceMetrics
from lit_dpo.training.ranks import gather_objects


@dataclass(frozen=True)
class PairTable:
    """What was measured of P held-out pairs, in the order of their data.

    Attributes:
        values: Quantities of ``PreferenceMetrics``, by name, (P,) each. Of those that are means over tokens, the sums.
        counts: Number of terms in the sums of ``values``, (P,) each; 1 for a quantity of the pair.
        prompts: Number of each pair's prompt, (P,).
        scores: Score of the chosen response minus that of the rejected one in the data, (P,); NaN without scores.
        groups: Value of the column ``data.group_by``, P entries; empty if there is none.
        sources: Name of each pair's source, P entries; empty if there is one source.
    """

    values: dict[str, np.ndarray]
    counts: dict[str, np.ndarray]
    prompts: np.ndarray
    scores: np.ndarray
    groups: tuple[str, ...]
    sources: tuple[str, ...]

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.prompts)


class TableCollector:
    """Collects what ``PreferenceMetrics`` takes in, with the origin of each pair."""

    def __init__(self) -> None:
        self._rows: list[torch.Tensor] = []
        self._origins: list[tuple[str, int]] = []

    def start(self) -> None:
        """Forgets what was collected."""
        self._rows, self._origins = [], []

    def add(self, metrics: PreferenceMetrics, batch: Any) -> None:
        """Adds the batch that the metrics have just taken in."""
        self._rows.append(metrics.rows[-1])
        self._origins += batch.origins

    def finish(self, trainer: Trainer, pairs: Any) -> PairTable | None:
        """The table, on the first rank; None on the others, and where pairs are not those of a ``PairDataset``.

        Collective: every rank must call it.
        """
        rows = torch.cat(self._rows).cpu().numpy() if self._rows else np.zeros((0, 0))
        parts = gather_objects(trainer, (rows, self._origins))
        self.start()
        if not trainer.is_global_zero or not hasattr(pairs, "columns"):
            return None
        found = [(part, origins) for part, origins in parts if len(origins)]
        if not found:
            return None
        return _table(np.concatenate([part for part, _ in found]), [o for _, origins in found for o in origins], pairs)


def _table(rows: np.ndarray, origins: list[tuple[str, int]], pairs: Any) -> PairTable:
    """The table of rows of ``PreferenceMetrics``, in the order of the data set."""
    places = {origin: place for place, origin in enumerate(pairs.origins())}
    where = np.array([places[origin] for origin in origins])
    order = np.argsort(where, kind="stable")
    rows, where = rows[order], where[order]
    values, counts = {}, {}
    names, optional = PreferenceMetrics.names, PreferenceMetrics.optional_names
    for number, name in enumerate(names):
        values[name], counts[name] = rows[:, number], np.ones(len(rows))
    for number, name in enumerate(optional, len(names)):
        many = rows[:, number + len(optional)]
        if many.any():
            values[name], counts[name] = rows[:, number], many
    _, prompts = np.unique(pairs.digests("prompt_key"), return_inverse=True)
    groups, sources = pairs.groups(), [pairs.names[number] for number in pairs.part_numbers()] if pairs.names else ()
    return PairTable(
        values,
        counts,
        prompts[where],
        pairs.score_differences()[where],
        tuple(groups[place] for place in where) if groups else (),
        tuple(sources[place] for place in where) if sources else (),
    )
