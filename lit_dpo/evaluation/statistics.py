"""Means of pairs with intervals: a bootstrap over prompts, a paired comparison, and what length alone explains.

Pairs of the same prompt are not independent, so prompts are drawn, not pairs (cluster bootstrap; Davison and Hinkley
1997, section 3.8; for evaluations of language models: Miller 2024, arXiv:2411.00640).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple, TypeAlias

import numpy as np

Sums: TypeAlias = np.ndarray  # (C, K) sums over the pairs of each of C prompts, of K quantities
Statistic: TypeAlias = Callable[[np.ndarray], np.ndarray]  # (B, K) sums ──► (B,) values
DRAWS = 64  # at a time: a draw of 100,000 prompts takes 0.8 MB


class Estimate(NamedTuple):
    """A value and its interval."""

    value: float
    low: float
    high: float

    def of_share(self, number: int, level: float) -> "Estimate":
        """The same with Wilson's interval if all or none of the observations count: a bootstrap would claim no error.

        Args:
            number: Number of independent observations.
            level: Confidence level.
        """
        alike = self.low == self.high and self.value in (0.0, 1.0)
        return Estimate(self.value, *wilson(self.value, number, level)) if alike else self


class Comparison(NamedTuple):
    """Two values of the same pairs, their difference and how likely one as large is by chance."""

    first: float
    second: float
    difference: Estimate  # first minus second
    p_value: float  # NaN if a value is


@dataclass(frozen=True)
class Resampling:
    """How intervals are computed.

    Args:
        num_resamples: Number of draws.
        level: Confidence level, in (0, 1).
        seed: Seed of the draws.

    Raises:
        ValueError: If an argument is outside its range.
    """

    num_resamples: int = 2000
    level: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_resamples < 100 or not 0 < self.level < 1:
            raise ValueError("intervals.num_resamples is at least 100, and intervals.level lies between 0 and 1.")

    def estimate(self, sums: Sums, statistics: dict[str, Statistic]) -> dict[str, Estimate]:
        """Values of all prompts, with percentile intervals of a bootstrap over prompts.

        All statistics see the same draws. The bounds are NaN with one prompt, or if in a tenth of the draws no pair
        counts.

        Args:
            sums: Sums of each prompt, (C, K).
            statistics: Functions of the sums of all drawn prompts, by name.
        """
        draws: dict[str, list[np.ndarray]] = {name: [] for name in statistics}
        for counts in self._draws(len(sums)):
            for name, statistic in statistics.items():
                draws[name].append(statistic(counts @ sums))
        total = sums.sum(0, keepdims=True)
        tails = [50 * (1 - self.level), 50 * (1 + self.level)]
        found = {}
        for name, statistic in statistics.items():
            values = np.concatenate(draws[name])
            values = values[np.isfinite(values)]
            enough = len(sums) > 1 and len(values) > 0.9 * self.num_resamples
            low, high = np.percentile(values, tails) if enough else (np.nan, np.nan)
            found[name] = Estimate(float(statistic(total)[0]), float(low), float(high))
        return found

    def compare(self, first: Sums, second: Sums, statistic: Statistic) -> Comparison:
        """Compares two sets of values of the same prompts.

        The p-value is that of a randomization test: under the null hypothesis, which of the two a prompt's values
        belong to does not matter, so it is drawn.

        Args:
            first: Sums of each prompt, (C, K).
            second: The same of the other.
            statistic: A function of the sums of all drawn prompts.
        """
        both = np.concatenate([first, second], axis=1)
        width = first.shape[1]

        def difference(sums: np.ndarray) -> np.ndarray:
            return statistic(sums[:, :width]) - statistic(sums[:, width:])

        estimate = self.estimate(both, {"difference": difference})["difference"]
        generator = np.random.default_rng(self.seed + 1)
        as_large, number = 1.0, 1  # the observed one counts
        total = both.sum(0)
        for size in _sizes(self.num_resamples):
            swapped = generator.integers(0, 2, (size, len(both))).astype(np.float64)
            moved = swapped @ (second - first)
            drawn = np.concatenate([total[:width] + moved, total[width:] - moved], axis=1)
            as_large += int((np.abs(difference(drawn)) >= abs(estimate.value) - 1e-12).sum())
            number += size
        if not np.isfinite(estimate.value):
            as_large = np.nan  # nothing is compared
        one, other = (float(statistic(sums.sum(0, keepdims=True))[0]) for sums in (first, second))
        return Comparison(one, other, estimate, as_large / number)

    def _draws(self, num_prompts: int) -> Iterator[np.ndarray]:
        """How often each prompt is drawn: (B, C) at a time."""
        generator = np.random.default_rng(self.seed)
        for size in _sizes(self.num_resamples):
            drawn = generator.integers(0, num_prompts, (size, num_prompts))
            yield np.stack([np.bincount(row, minlength=num_prompts) for row in drawn]).astype(np.float64)


def sums_by_prompt(values: np.ndarray, prompts: np.ndarray) -> Sums:
    """Sums over the pairs of each prompt.

    Args:
        values: (P, K) quantities of the pairs.
        prompts: (P,) number of each pair's prompt.
    """
    _, numbers = np.unique(prompts, return_inverse=True)
    sums = np.zeros((numbers.max(initial=-1) + 1, values.shape[1]))
    np.add.at(sums, numbers, values)
    return sums


def ratio(numerator: int, denominator: int) -> Statistic:
    """The statistic that divides two of the sums; NaN where the divisor is 0."""

    def statistic(sums: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(sums[:, numerator] / sums[:, denominator])

    return statistic


def mean_of_ratios(*pairs: tuple[int, int]) -> Statistic:
    """The statistic that averages several ratios of sums."""
    parts = [ratio(*pair) for pair in pairs]
    return lambda sums: np.mean([part(sums) for part in parts], axis=0)


def wilson(share: float, number: int, level: float) -> tuple[float, float]:
    """Wilson's interval of a share. It has a width also where all or none of the pairs count.

    Args:
        share: The share, in [0, 1].
        number: Number of independent observations.
        level: Confidence level.

    References:
        Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    middle = (share + z**2 / (2 * number)) / (1 + z**2 / number)
    half = z / (1 + z**2 / number) * np.sqrt(share * (1 - share) / number + z**2 / (4 * number**2))
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def _sizes(number: int) -> Iterator[int]:
    """A number in parts of ``DRAWS`` at most."""
    while number > 0:
        yield min(DRAWS, number)
        number -= DRAWS
