"""Alignment by optimal transport: compares distributions of rewards, not the two responses of a pair."""

from torch import Tensor

from lit_dpo.objectives.base import LogRatioObjective, PairLogps, within
from lit_dpo.objectives.dpo import logistic


class AOT(LogRatioObjective):
    """AOT on pairs: compares sorted margins of the policy with sorted margins of the reference, quantile by quantile.

    It sorts the pairs of one batch on one process, so ``data.batch_size`` changes the loss. With batch size 1 it is
    DPO. The i-th loss belongs to the i-th quantile, not to the i-th pair.

    Args:
        beta: Strength of the pull towards the reference; positive.
        label_smoothing: Probability that a label is flipped, in [0, 0.5).

    Raises:
        ValueError: If a parameter is outside its range.

    References:
        Melnyk et al. 2024, arXiv:2406.05882, Section 3 (paired).

    Example:
        >>> policy = PairLogps.from_sums([-1.0, -3.0], [-2.0, -2.0])
        >>> reference = PairLogps.from_sums([-2.0, -1.0], [-2.0, -2.0])
        >>> AOT(beta=1.0)(policy, reference)  # (-1, 1) against (0, 1)
        tensor([1.3133, 0.6931])
    """

    pairwise = False

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0) -> None:
        super().__init__(beta)
        self.label_smoothing = within("label_smoothing", label_smoothing, 0, 0.5)

    def forward(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """The loss of each quantile, (P,)."""
        ours = (policy.chosen - policy.rejected).sort().values
        theirs = (reference.chosen - reference.rejected).sort().values
        return logistic(self.beta * (ours - theirs), self.label_smoothing)


class AOTUnpaired(AOT):
    """AOT without pairs: compares sorted rewards of all chosen and all rejected responses, quantile by quantile.

    Args:
        beta: Strength of the pull towards the reference; positive.
        label_smoothing: Probability that a label is flipped, in [0, 0.5).

    Raises:
        ValueError: If a parameter is outside its range.

    References:
        Melnyk et al. 2024, arXiv:2406.05882, Section 3 (unpaired).

    Example:
        >>> policy = PairLogps.from_sums([-1.0, -3.0], [-2.0, -2.0])
        >>> reference = PairLogps.from_sums([-2.0, -1.0], [-2.0, -3.0])
        >>> AOTUnpaired(beta=1.0)(policy, reference)  # (-2, 1) against (0, 1)
        tensor([2.1269, 0.6931])
    """

    def forward(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """The loss of each quantile, (P,)."""
        chosen, rejected, _ = self.rewards(policy, reference)
        return logistic(chosen.sort().values - rejected.sort().values, self.label_smoothing)
