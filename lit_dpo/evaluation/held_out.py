"""A table of held-out pairs ──► every metric with its interval, by group, and two models on the same pairs."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from lit_dpo.evaluation.statistics import (
    Comparison,
    Estimate,
    Resampling,
    Statistic,
    mean_of_ratios,
    ratio,
    sums_by_prompt,
)
from lit_dpo.evaluation.table import PairTable

ACCURACY, LONGER, CONTROLLED = "rewards/accuracies", "longer_wins", "rewards/accuracies_length_controlled"
SHARES = (ACCURACY, LONGER, CONTROLLED, "rewards/negative_margins")
OF_GROUPS = (ACCURACY, CONTROLLED, LONGER, "rewards/margins", "loss")
COMPARED = ("loss", ACCURACY, CONTROLLED, "rewards/margins", "logps/chosen", "logps/rejected", "kl")
LENGTHS = (0.5, 0.8, 1.25, 2.0)  # bounds of groups of the ratio of lengths, chosen over rejected
FEW_SCORES = 6  # different score margins that are groups each; more are grouped by thirds


@dataclass(frozen=True)
class Group:
    """Metrics of some of the pairs."""

    kind: str  # what the pairs are grouped by
    name: str
    num_pairs: int
    num_prompts: int
    metrics: dict[str, Estimate]


@dataclass(frozen=True)
class HeldOut:
    """Metrics of all held-out pairs, and of groups of them."""

    total: Group
    groups: list[Group]
    level: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"level": self.level, "total": _plain(self.total), "groups": [_plain(group) for group in self.groups]}


def held_out_metrics(table: PairTable, resampling: Resampling, *, by_group: bool = True) -> HeldOut:
    """Every metric of a table with its interval, of all pairs and of each group.

    Besides the metrics of the run:

    - ``longer_wins``, the accuracy of preferring the longer response, a tie counting 0.5. A reward accuracy that is not
      above it may have learned nothing but length;
    - ``rewards/accuracies_length_controlled``, the mean of two accuracies: of pairs whose chosen response is the longer
      one, and of pairs whose chosen response is the shorter one. What prefers by length alone gets 0.5.

    Args:
        table: The pairs.
        resampling: How intervals are computed.
        by_group: Whether to group the pairs too.
    """
    columns, statistics = _quantities(table)

    def measured(kind: str, name: str, mask: np.ndarray, chosen: dict[str, Statistic]) -> Group:
        sums = sums_by_prompt(columns[mask], table.prompts[mask])
        metrics = resampling.estimate(sums, chosen)
        metrics |= {key: metrics[key].of_share(len(sums), resampling.level) for key in SHARES if key in metrics}
        return Group(kind, name, int(mask.sum()), len(sums), metrics)

    total = measured("", "all pairs", np.ones(len(table), bool), statistics)
    of_groups = {key: statistics[key] for key in OF_GROUPS}
    groups = [measured(*named, of_groups) for named in _masks(table)] if by_group else []
    return HeldOut(total, groups, resampling.level)


def compared(first: PairTable, second: PairTable, resampling: Resampling) -> dict[str, Comparison]:
    """Two models on the same pairs: values, difference with interval and p-value of each metric that both have.

    Raises:
        ValueError: If the tables are not of the same pairs.
    """
    if len(first) != len(second) or (first.prompts != second.prompts).any():
        raise ValueError("The two models were not measured on the same pairs.")
    (own, statistics), (others, known) = _quantities(first), _quantities(second)
    names = [name for name in COMPARED if name in statistics and name in known]
    if statistics.keys() != known.keys():
        raise ValueError("The two models have different metrics: one of them has no reference, or other statistics.")
    sums, theirs = (sums_by_prompt(values, first.prompts) for values in (own, others))
    return {name: resampling.compare(sums, theirs, statistics[name]) for name in names}


def _quantities(table: PairTable) -> tuple[np.ndarray, dict[str, Statistic]]:
    """Columns to sum, (P, K), and each metric as a function of their sums."""
    columns: list[np.ndarray] = []
    statistics: dict[str, Statistic] = {}

    def add(*given: np.ndarray) -> tuple[int, ...]:
        columns.extend(given)
        return tuple(range(len(columns) - len(given), len(columns)))

    for name, values in table.values.items():
        top, bottom = add(values, table.counts[name])
        statistics[name] = ratio(top, bottom)
    difference = table.values["lengths/chosen"] - table.values["lengths/rejected"]
    longer = np.where(difference == 0, 0.5, difference > 0)
    accuracy = table.values[ACCURACY]
    top, bottom = add(longer, np.ones(len(table)))
    statistics[LONGER] = ratio(top, bottom)
    a, b, c, d = add(accuracy * longer, longer, accuracy * (1 - longer), 1 - longer)
    statistics[CONTROLLED] = mean_of_ratios((a, b), (c, d))
    return np.stack(columns, axis=1), statistics


def _masks(table: PairTable) -> Iterator[tuple[str, str, np.ndarray]]:
    """The groups of the pairs: kind, name, and which pairs, (P,)."""
    for kind, labels in {"source": table.sources, "group": table.groups}.items():
        for name in dict.fromkeys(sorted(labels)):
            yield kind, name, np.array(labels) == name
    lengths = table.values["lengths/chosen"] / table.values["lengths/rejected"]
    yield from _bins("length, chosen / rejected", lengths, LENGTHS)
    scores = table.scores[np.isfinite(table.scores)]
    if len(scores):
        different = np.unique(scores)
        if len(different) <= FEW_SCORES:
            for value in different:
                yield "score margin", f"{value:g}", table.scores == value
        else:
            yield from _bins("score margin", table.scores, tuple(np.unique(np.quantile(scores, [1 / 3, 2 / 3]))))


def _bins(kind: str, values: np.ndarray, bounds: tuple[float, ...]) -> Iterator[tuple[str, str, np.ndarray]]:
    """Groups of pairs between bounds, without those that have no pair."""
    for low, high in zip((-np.inf, *bounds), (*bounds, np.inf), strict=True):
        mask = (values > low) & (values <= high)
        if mask.any():
            name = f"above {low:.3g}" if high == np.inf else f"to {high:.3g}"
            yield kind, name, mask


def _plain(group: Group) -> dict[str, Any]:
    return {**vars(group), "metrics": {name: list(estimate) for name, estimate in group.metrics.items()}}
