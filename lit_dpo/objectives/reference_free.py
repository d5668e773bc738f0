"""Objectives without a reference: none is computed, so that a step costs one forward and one backward."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_dpo.objectives.base import Objective, PairLogps, Rewards, positive, within
from lit_dpo.objectives.dpo import logistic

LARGEST_MEAN = -1e-6  # nats a token; at 0, a certain response, the odds are infinite


def mean_logps(policy: PairLogps) -> Rewards:
    """Log-probs per token of both responses."""
    return Rewards(policy.chosen / policy.chosen_lengths, policy.rejected / policy.rejected_lengths)


class SFT(Objective):
    """Supervised fine-tuning on the chosen response, most often as a term of a ``Mixture``.

    Implicit rewards are log-probs per token: which response the policy finds more likely.

    Args:
        average: ``pair``, the mean over pairs of the mean over a response's tokens (iterative RPO's); ``token``, the
            mean over all chosen tokens of the batch, which is what TRL calls ``sft``.

    Raises:
        ValueError: If ``average`` is neither.

    References:
        Pang et al. 2024, arXiv:2404.19733, Eq. 1, its term L_NLL.

    Example:
        >>> SFT()(PairLogps.from_sums([-10.0], [-12.0], lengths=(4, 2)), PairLogps.from_sums([0.0], [0.0]))
        tensor([2.5000])
    """

    uses_reference = False

    def __init__(self, average: Literal["pair", "token"] = "pair") -> None:
        super().__init__()
        if average not in ("pair", "token"):
            raise ValueError(f"objective.average must be 'pair' or 'token', not {average!r}.")
        self.average = average
        self.pairwise = average == "pair"

    def rewards(self, policy: PairLogps, reference: PairLogps) -> Rewards:
        """Log-probs per token."""
        return mean_logps(policy)

    def forward(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """The loss of each pair, (P,)."""
        lengths = policy.chosen_lengths.to(policy.chosen.dtype)
        return -policy.chosen / (lengths if self.average == "pair" else lengths.mean())


class SimPO(Objective):
    """SimPO: the log-prob per token as reward, and a margin that is asked for.

    Args:
        beta: Scale of the rewards; positive.
        gamma: The margin; 0 or more. The paper names its ratio to β, about 0.5.
        label_smoothing: Probability that a label is flipped, in [0, 0.5).

    Raises:
        ValueError: If a parameter is outside its range.

    References:
        Meng et al. 2024, arXiv:2405.14734, Eq. 6, with its β 2.0 and γ/β 0.5.

    Example:
        >>> policy = PairLogps.from_sums([-4.0], [-6.0], lengths=(4, 4))
        >>> SimPO(beta=2.0, gamma=1.0)(policy, PairLogps.from_sums([0.0], [0.0]))
        tensor([0.6931])
    """

    uses_reference = False

    def __init__(self, beta: float = 2.0, gamma: float = 1.0, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.beta = positive("beta", beta)
        self.gamma = within("gamma", gamma, 0, float("inf"))
        self.label_smoothing = within("label_smoothing", label_smoothing, 0, 0.5)

    def rewards(self, policy: PairLogps, reference: PairLogps) -> Rewards:
        """β·log π / |y|."""
        means = mean_logps(policy)
        return Rewards(self.beta * means.chosen, self.beta * means.rejected)

    def forward(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """The loss of each pair, (P,)."""
        return logistic(self.rewards(policy, reference).margins - self.gamma, self.label_smoothing)


class ORPO(Objective):
    """ORPO: supervised fine-tuning on the chosen response, and its odds against those of the rejected one.

    The probability of a response is the geometric mean of its tokens'. Implicit rewards are log-odds, whose margin is
    the paper's log odds ratio. Of the prompt nothing is learned.

    Args:
        weight: Weight of the odds ratio, λ of the paper; positive.

    Raises:
        ValueError: If ``weight`` is not positive.

    References:
        Hong et al. 2024, arXiv:2403.07691, Eqs. 4, 6 and 7, with its λ.

    Example:
        >>> ORPO()(PairLogps.from_sums([-4.0], [-6.0], lengths=(4, 4)), PairLogps.from_sums([0.0], [0.0]))
        tensor([1.0401])
    """

    uses_reference = False

    def __init__(self, weight: float = 0.1) -> None:
        super().__init__()
        self.weight = positive("weight", weight)

    def rewards(self, policy: PairLogps, reference: PairLogps) -> Rewards:
        """Log-odds log(p / (1 - p))."""
        chosen, rejected, _ = mean_logps(policy)
        return Rewards(_log_odds(chosen), _log_odds(rejected))

    def forward(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """The loss of each pair, (P,)."""
        return -mean_logps(policy).chosen - self.weight * logsigmoid(self.rewards(policy, reference).margins)


class CPO(Objective):
    """CPO: DPO under a uniform reference, and supervised fine-tuning on the chosen response.

    Args:
        beta: Scale of the rewards; positive.
        alpha: Weight of the fine-tuning, per token as in the authors' code; 0 or more.
        label_smoothing: Probability that a label is flipped, in [0, 0.5).

    Raises:
        ValueError: If a parameter is outside its range.

    References:
        Xu et al. 2024, arXiv:2401.08417, Eq. 3 and its L_NLL, with its β.

    Example:
        >>> CPO()(PairLogps.from_sums([-4.0], [-6.0], lengths=(4, 4)), PairLogps.from_sums([0.0], [0.0]))  # 0.5981 + 1
        tensor([1.5981])
    """

    uses_reference = False

    def __init__(self, beta: float = 0.1, alpha: float = 1.0, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.beta = positive("beta", beta)
        self.alpha = within("alpha", alpha, 0, float("inf"))
        self.label_smoothing = within("label_smoothing", label_smoothing, 0, 0.5)

    def rewards(self, policy: PairLogps, reference: PairLogps) -> Rewards:
        """β·log π."""
        return Rewards(self.beta * policy.chosen, self.beta * policy.rejected)

    def forward(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """The loss of each pair, (P,)."""
        preference = logistic(self.rewards(policy, reference).margins, self.label_smoothing)
        return preference - self.alpha * mean_logps(policy).chosen


def _log_odds(mean: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p."""
    mean = mean.clamp(max=LARGEST_MEAN)
    return mean - torch.log(-torch.expm1(mean))
