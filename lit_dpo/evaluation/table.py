"""Batches of an evaluation ──► a table of the held-out pairs, gathered from all ranks."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer

from lit_dpo.data.batch import PairBatch
from lit_dpo.data.pairs import PairDataset
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
        origins: Source, in full, and row of each pair, P entries; empty if they are not known.
    """

    values: dict[str, np.ndarray]
    counts: dict[str, np.ndarray]
    prompts: np.ndarray
    scores: np.ndarray
    groups: tuple[str, ...]
    sources: tuple[str, ...]
    origins: tuple[tuple[str, int], ...] = ()

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.prompts)


class TableCollector:
    """Collects what ``PreferenceMetrics`` takes in, with the origin of each pair."""

    def __init__(self) -> None:
        self._rows: list[torch.Tensor] = []
        self._origins: list[tuple[int, int]] = []

    def start(self) -> None:
        """Forgets what was collected."""
        self._rows, self._origins = [], []

    def add(self, module: Any, batch: Any) -> None:
        """Adds the batch that the metrics of a module have just taken in. Other modules and batches give no table."""
        metrics = getattr(module, "eval_metrics", None)
        if isinstance(metrics, PreferenceMetrics) and metrics.rows and isinstance(batch, PairBatch):
            self._rows.append(metrics.rows[-1])
            groups = batch.groups or (0,) * len(batch)
            self._origins += [(group, row) for group, (_, row) in zip(groups, batch.origins, strict=True)]

    def finish(self, trainer: Trainer, pairs: Any) -> PairTable | None:
        """The table, on the first rank; None on the others, and if the pairs are not those of a ``PairDataset``.

        Collective: every rank must call it.
        """
        rows = torch.cat(self._rows).cpu().numpy() if self._rows else np.zeros((0, 0))
        parts = gather_objects(trainer, (rows, self._origins))
        self.start()
        if not trainer.is_global_zero or not isinstance(pairs, PairDataset):
            return None
        found = [(part, origins) for part, origins in parts if len(origins)]
        if not found:
            return None
        return _table(np.concatenate([part for part, _ in found]), [o for _, origins in found for o in origins], pairs)


def _table(rows: np.ndarray, origins: list[tuple[int, int]], pairs: PairDataset) -> PairTable | None:
    """The table of rows of ``PreferenceMetrics``, in the order of the data set."""
    places = {origin: place for place, origin in enumerate(pairs.origins())}
    if not all(origin in places for origin in origins):
        return None  # a data module of somebody's own gives other pairs than it holds
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
        tuple((pairs.parts[origins[place][0]].source, origins[place][1]) for place in order),
    )
