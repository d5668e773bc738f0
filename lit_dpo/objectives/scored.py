"""Objectives that use the scores in the data. They take into account how much better the chosen response is."""

from typing import Literal

from torch import Tensor

from lit_dpo.objectives.base import LogRatioObjective, Objective, PairLogps, positive
from lit_dpo.objectives.composed import Wrapper
from lit_dpo.objectives.dpo import logistic


def score_differences(policy: PairLogps) -> Tensor:
    """Score of the chosen response minus that of the rejected one, (P,); NaN where the data has no scores.

    Raises:
        ValueError: If the log-probs come without the data's scores.
    """
    if policy.responses is None:
        raise ValueError("An objective that uses the data's scores needs PairLogps.responses.")
    chosen, rejected = policy.responses.best_and_worst(policy.responses.scores)
    return chosen - rejected


class ODPO(LogRatioObjective):
    """DPO with an offset: the margin must exceed an offset that grows with the difference of the scores.

    With ``scale="log"``, equal scores give the offset -∞. Such a pair has zero loss and no gradient.

    Args:
        beta: Strength of the pull towards the reference; positive.
        alpha: Strength of the offset; positive.
        scale: ``log`` sets the offset to α·log(score difference), ``linear`` to α·(score difference).

    Raises:
        ValueError: If a parameter is outside its range.

    References:
        Amini et al. 2024, arXiv:2402.10571, which uses the logarithm and tunes α between 0 and 1.

    Example:
        >>> policy = PairLogps.from_sums([-10.0], [-12.0], scores=(8.0, 5.0))
        >>> reference = PairLogps.from_sums([-11.0], [-11.0])
        >>> ODPO(beta=0.5, alpha=0.5, scale="linear")(policy, reference)  # margin 1, offset 1.5
        tensor([0.9741])
    """

    uses_scores = True

    def __init__(self, beta: float = 0.1, alpha: float = 1.0, scale: Literal["log", "linear"] = "log") -> None:
        super().__init__(beta)
        self.alpha = positive("alpha", alpha)
        if scale not in ("log", "linear"):
            raise ValueError(f"objective.scale must be 'log' or 'linear', not {scale!r}.")
        self.scale = scale

    def forward(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """The loss of each pair, (P,)."""
        difference = score_differences(policy)
        offset = self.alpha * (difference.log() if self.scale == "log" else difference)
        return logistic(self.rewards(policy, reference).margins - offset)


class ScoreWeighted(Wrapper):
    """Wraps another objective and weights the loss of each pair by the difference of its scores.

    Args:
        objective: The objective to weight; by default ``Sigmoid``.
        scale: Weight of a pair whose scores differ by 1; positive.

    Raises:
        ValueError: If a parameter is outside its range, or a loss of the objective does not belong to a single pair of
            responses.

    References:
        Wang et al. 2024, arXiv:2408.09385 (reward difference optimization), with the data's scores as rewards.

    Example:
        >>> policy = PairLogps.from_sums([-10.0], [-12.0], scores=(8.0, 5.0))
        >>> reference = PairLogps.from_sums([-11.0], [-11.0])
        >>> ScoreWeighted(scale=0.5)(policy, reference)  # 1.5 * log(1 + exp(-0.1 * 2))
        tensor([0.8972])
    """

    def __init__(self, objective: Objective | None = None, scale: float = 1.0) -> None:
        super().__init__(objective)
        self.require_pairwise("weights")
        self.scale = positive("scale", scale)
        self.uses_scores = True

    def forward(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """The loss of each pair, (P,)."""
        return self.scale * score_differences(policy) * self.objective(policy, reference)
