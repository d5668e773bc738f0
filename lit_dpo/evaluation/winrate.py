"""Verdicts on two answers to each prompt ──► win rate with its interval, and what it would be for answers as long.

Length control is a logistic regression of the verdicts on the difference in length, read at no difference: the length
term of AlpacaEval 2 (Dubois et al. 2024, arXiv:2404.04475, section 4).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lit_dpo.evaluation.statistics import Estimate, Resampling, ratio, sums_by_prompt

STEPS = 50  # of Newton's method, which needs about 6
RIDGE = 1e-3  # keeps the slope finite if length decides every verdict


class Verdict(NamedTuple):
    """A judge's verdict on two answers: its preference for the first one, in [0, 1], in each order that it was asked.

    A preference that could not be read is None.
    """

    preferences: tuple[float | None, ...]

    @property
    def score(self) -> float:
        """1 if the first answer wins, 0 if the second does, 0.5 for a tie. Verdicts that differ are a tie."""
        sides = {_side(one) for one in self.preferences}
        return sides.pop() if len(sides) == 1 else 0.5

    @property
    def readable(self) -> bool:
        """Whether all answers of the judge were verdicts."""
        return None not in self.preferences

    @property
    def consistent(self) -> bool:
        """Whether the order changes nothing."""
        return len({_side(one) for one in self.preferences}) == 1


def _side(preference: float | None) -> float:
    return 0.5 if preference is None or preference == 0.5 else float(preference > 0.5)


@dataclass(frozen=True)
class WinRate:
    """How often the first of two models wins.

    Attributes:
        rate: Share of prompts that it wins, a tie counting half.
        controlled: The same for answers of equal length.
        wins: Number of prompts that it wins.
        ties: Number of ties.
        losses: Number of prompts that it loses.
        unreadable: Number of cases in which the judge wrote no verdict. They count as ties.
        consistency: Share of the other verdicts that the order of the answers does not change; NaN if none was asked
            twice.
        lengths: Mean length of the answers of both, in characters.
    """

    rate: Estimate
    controlled: Estimate
    wins: int
    ties: int
    losses: int
    unreadable: int
    consistency: float
    lengths: tuple[float, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dict(vars(self))


def win_rate(verdicts: list[Verdict], lengths: np.ndarray, resampling: Resampling) -> WinRate:
    """The win rate of the first answers.

    Args:
        verdicts: One for each of N prompts.
        lengths: Lengths of both answers, (N, 2).
        resampling: How intervals are computed.
    """
    scores = np.array([verdict.score for verdict in verdicts])
    columns = np.stack([scores, np.ones(len(scores))], axis=1)
    found = resampling.estimate(sums_by_prompt(columns, np.arange(len(scores))), {"rate": ratio(0, 1)})
    difference = lengths[:, 0] - lengths[:, 1]
    scaled = np.tanh(difference / max(float(difference.std()), 1.0))
    generator = np.random.default_rng(resampling.seed)
    drawn = generator.integers(0, len(scores), (resampling.num_resamples, len(scores)))
    controlled = Estimate(np.nan, np.nan, np.nan)
    if len(np.unique(scores)) > 1:  # equal verdicts say nothing of lengths
        fits = [at_equal_length(scores[rows], scaled[rows]) for rows in drawn]
        low, high = np.percentile(fits, [50 * (1 - resampling.level), 50 * (1 + resampling.level)])
        controlled = Estimate(at_equal_length(scores, scaled), float(low), float(high))
    asked_twice = [one.consistent for one in verdicts if len(one.preferences) > 1 and one.readable]
    return WinRate(
        rate=found["rate"].of_share(len(scores), resampling.level),
        controlled=controlled,
        wins=int((scores == 1).sum()),
        ties=int((scores == 0.5).sum()),
        losses=int((scores == 0).sum()),
        unreadable=sum(not one.readable for one in verdicts),
        consistency=float(np.mean(asked_twice)) if asked_twice else float("nan"),
        lengths=(float(lengths[:, 0].mean()), float(lengths[:, 1].mean())),
    )


def at_equal_length(scores: np.ndarray, difference: np.ndarray) -> float:
    """The probability to win at no difference in length, by logistic regression.

    Args:
        scores: Verdicts in [0, 1], (N,).
        difference: Scaled difference in length of each, (N,).
    """
    features = np.stack([np.ones(len(scores)), difference], axis=1)
    weights = np.zeros(2)
    for _ in range(STEPS):
        chance = 1 / (1 + np.exp(-features @ weights))
        gradient = features.T @ (scores - chance) - RIDGE * weights
        curvature = (features * (chance * (1 - chance))[:, None]).T @ features + RIDGE * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        weights = np.clip(weights + step, -30, 30)
        if np.abs(step).max() < 1e-9:
            break
    return float(1 / (1 + np.exp(-weights[0])))
