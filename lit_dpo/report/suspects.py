"""Margins of training pairs ──► those whose label the model contradicts, and how many labels are wrong."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lit_dpo.evaluation.statistics import Estimate, Resampling, ratio, sums_by_prompt


class Ranking(NamedTuple):
    """P training pairs, the most suspicious first."""

    order: np.ndarray  # (P,) places of the pairs
    margins: np.ndarray  # (P,) mean margin over the times at which it was measured, in the order of the pairs
    spread: np.ndarray  # (P,) standard deviation over these times; 0 if there is one
    wrong: np.ndarray  # (P,) probability that the label is contradicted: σ(-scale·margin)
    scale: float  # that makes σ(scale·margin) the share of labels that agree


@dataclass(frozen=True)
class FlippedShare:
    """How many labels are wrong, in two ways that assume different things."""

    by_trusted: Estimate | None  # held-out labels are right
    by_confidence: Estimate  # the model is right where it is surest; NaN if it is no better than chance
    accuracy: Estimate  # of the labels, by models that did not see them
    trusted_accuracy: Estimate | None


def rank(values: np.ndarray) -> Ranking:
    """Ranks pairs by their mean margin.

    The mean over the times of a training is steadier than the last margin: pairs that are hard swing, wrong ones stay
    low (dataset cartography: Swayamdipta et al. 2020, arXiv:2009.10795).

    Args:
        values: Margins of P pairs at C times, (P, C); NaN where one was not measured.
    """
    margins, spread = np.nanmean(values, axis=1), np.nanstd(values, axis=1)
    scale = calibrated_scale(margins)
    wrong = 1 / (1 + np.exp(np.clip(scale * margins, -500, 500)))
    return Ranking(np.argsort(margins, kind="stable"), margins, spread, wrong, scale)


def calibrated_scale(margins: np.ndarray) -> float:
    """The s that makes σ(s·margin) the likeliest probability that a label agrees; at least 0.

    A logistic regression of one weight without an intercept, since which answer is called the first is arbitrary
    (temperature scaling: Guo et al. 2017, arXiv:1706.04599). Newton's method; the log-likelihood is concave.
    """
    size = float(np.abs(margins).mean()) or 1.0
    z, weight = margins / size, 0.0
    for _ in range(50):
        p = 1 / (1 + np.exp(-np.clip(weight * z, -500, 500)))
        gradient = float((z * (1 - p)).sum()) - 1e-3 * weight  # a small ridge: margins may all be positive
        curvature = float((z**2 * p * (1 - p)).sum()) + 1e-3
        step = gradient / curvature
        weight += float(np.clip(step, -5, 5))
        if abs(step) < 1e-10:
            break
    return max(0.0, weight / size)


def flipped_share(
    ranking: Ranking,
    prompts: np.ndarray,
    trusted: np.ndarray,
    trusted_prompts: np.ndarray,
    resampling: Resampling,
) -> FlippedShare:
    """Estimates the share of labels that are wrong, with intervals of a bootstrap over prompts.

    *By trusted labels*: a model with accuracy a on pairs whose labels are right has the accuracy a(1 - ε) + (1 - a)ε on
    pairs of which a share ε is flipped at random. So ε = (a - a')/(2a - 1), where a' is the accuracy on training pairs
    that the model did not see.

    *By confidence* (confident learning: Northcutt et al. 2021, arXiv:1911.00068, Eq. 1 and 3): the share of confident
    contradictions among all confident verdicts. A verdict is confident if its probability is at least the mean
    probability of the given labels. What the model itself gets wrong counts as a wrong label, so with a weak model this
    is an upper bound.

    Args:
        ranking: The pairs.
        prompts: Number of each training pair's prompt, (P,).
        trusted: Margins of T held-out pairs under F models, (T, F). Verdicts are averaged, not margins: several models
            together would be right more often than each of those that judged the training pairs.
        trusted_prompts: Number of each one's prompt, (T,).
        resampling: How intervals are computed.
    """
    right = np.where(ranking.margins == 0, 0.5, ranking.margins > 0)
    agree = 1 - ranking.wrong
    threshold = float(agree.mean())
    columns = [
        right,
        np.ones_like(right),
        ranking.wrong >= threshold,
        (ranking.wrong >= threshold) | (agree >= threshold),
    ]
    sums = sums_by_prompt(np.stack(columns, 1).astype(np.float64), prompts)
    found = resampling.estimate(sums, {"accuracy": ratio(0, 1), "confidence": ratio(2, 3)})
    number = len(sums)
    found = {name: one.of_share(number, resampling.level) for name, one in found.items()}
    if not ranking.scale:  # all probabilities are one half: the model knows nothing of the labels
        found["confidence"] = Estimate(np.nan, np.nan, np.nan)
    if len(trusted) < 2:
        return FlippedShare(None, found["confidence"], found["accuracy"], None)
    right_there = np.where(trusted == 0, 0.5, trusted > 0).mean(1)
    theirs = sums_by_prompt(np.stack([right_there, np.ones_like(right_there)], 1), trusted_prompts)
    accuracy = resampling.estimate(theirs, {"accuracy": ratio(0, 1)})["accuracy"].of_share(
        len(theirs), resampling.level
    )
    # Two independent samples: the same number of draws of each, paired in any order
    generator = np.random.default_rng(resampling.seed)
    draws = []
    for _ in range(resampling.num_resamples):
        own = sums[generator.integers(0, len(sums), len(sums))].sum(0)
        other = theirs[generator.integers(0, len(theirs), len(theirs))].sum(0)
        draws.append(_share(other[0] / other[1], own[0] / own[1]))
    tails = [50 * (1 - resampling.level), 50 * (1 + resampling.level)]
    finite = [value for value in draws if np.isfinite(value)]
    enough = len(finite) > 0.9 * resampling.num_resamples
    low, high = np.percentile(finite, tails) if enough else (np.nan, np.nan)
    share = Estimate(_share(accuracy.value, found["accuracy"].value), float(low), float(high))
    return FlippedShare(share, found["confidence"], found["accuracy"], accuracy)


def _share(trusted: float, seen: float) -> float:
    """ε = (a - a')/(2a - 1), within [0, 1]; NaN if the model is no better than chance on trusted pairs."""
    return float(np.clip((trusted - seen) / (2 * trusted - 1), 0, 1)) if trusted > 0.5 + 1e-9 else float("nan")
