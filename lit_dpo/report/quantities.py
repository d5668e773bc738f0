"""A table of held-out pairs ──► histograms, and how well the preference probability is calibrated."""

import math
from typing import NamedTuple

import numpy as np

from lit_dpo.evaluation.statistics import wilson

BINS = 30  # of a histogram
CONFIDENCE_BINS = 10  # as in Guo et al. 2017


class Histogram(NamedTuple):
    """How many pairs lie in each bin, before and after training."""

    edges: list[float]  # one more than the counts
    before: list[int] | None
    after: list[int]
    below: list[int]  # pairs outside the edges, before and after, which count in the outermost bins
    above: list[int]


class Calibration(NamedTuple):
    """Confidence in the preferred response, and how often it is the one that people preferred."""

    confidence: list[float]  # mean of each bin that has pairs
    accuracy: list[float]
    low: list[float]  # Wilson's interval
    high: list[float]
    counts: list[int]
    error: float  # expected calibration error: mean distance of both, weighted by counts


def histogram(before: np.ndarray | None, after: np.ndarray) -> Histogram:
    """The histogram of a quantity of P pairs over the same bins before and after.

    Outliers would squeeze all others into one bin, so the bins span the middle 98 % of both.
    """
    every = after if before is None else np.concatenate([before, after])
    every = every[np.isfinite(every)]
    low, high = (float(bound) for bound in np.percentile(every, [1, 99])) if len(every) else (0.0, 1.0)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, BINS + 1)

    def counted(values: np.ndarray) -> list[int]:
        return [int(count) for count in np.histogram(np.clip(values, low, high), edges)[0]]

    sides = [after] if before is None else [before, after]
    return Histogram(
        [float(edge) for edge in edges],
        None if before is None else counted(before),
        counted(after),
        [int((values < low).sum()) for values in sides],
        [int((values > high).sum()) for values in sides],
    )


def calibration(margins: np.ndarray, level: float = 0.95) -> Calibration:
    """How well σ(margin) is calibrated as the probability that the chosen response is preferred.

    Each pair gives the confidence max(σ(m), 1 - σ(m)) in the response with the higher reward, and whether that is the
    chosen one; a tie counts one half.

    Args:
        margins: Differences of implicit rewards, (P,).
        level: Confidence level of the intervals.

    References:
        Guo et al. 2017, arXiv:1706.04599, Eq. 2 and 3.
    """
    margins = margins[np.isfinite(margins)]
    confidence = 1 / (1 + np.exp(-np.clip(np.abs(margins), 0, 500)))
    right = np.where(margins == 0, 0.5, margins > 0)
    bins = np.clip(((confidence - 0.5) / 0.5 * CONFIDENCE_BINS).astype(int), 0, CONFIDENCE_BINS - 1)
    rows = []
    for number in range(CONFIDENCE_BINS):
        inside = bins == number
        if many := int(inside.sum()):
            share = float(right[inside].mean())
            rows.append((float(confidence[inside].mean()), share, *wilson(share, many, level), many))
    error = sum(abs(row[0] - row[1]) * row[4] for row in rows) / len(margins) if len(margins) else math.nan
    sure, shares, low, high, counts = ([row[place] for row in rows] for place in range(5))
    return Calibration(sure, shares, low, high, [int(count) for count in counts], error)
