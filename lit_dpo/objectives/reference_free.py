"""Objectives without a reference. A step costs one forward and one backward pass of the policy, and no more."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_dpo.objectives.base import Objective, PairLogps, Rewards, positive, within
from lit_dpo.objectives.dpo import logistic

LARGEST_MEAN = -1e-6  # nats per token; at 0 (probability 1) the odds are infinite


def mean_logps(policy: PairLogps) -> Rewards:
    """Mean log-prob per token of the chosen and of the rejected response."""
    return Rewards(policy.chosen / policy.chosen_lengths, policy.rejected / policy.rejected_lengths)


class SFT(Objective):
    """Supervised fine-tuning on the chosen response. It is mostly used as a term of a ``Mixture``.

    Implicit rewards are log-probs per token. They show which response the policy finds more likely.

    Args:
        average: How token losses are averaged. ``pair`` averages over the tokens of each chosen response, then over
            pairs (iterative RPO). ``token`` averages over all chosen tokens of the batch (TRL's ``sft``).

    Raises:
        ValueError: If ``average`` is neither ``pair`` nor ``token``.

    References:
        Pang et al. 2024, arXiv:2404.19733, Eq. 1, term L_NLL.

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
    """SimPO: the reward is β times the log-prob per token, and the loss has a target margin γ.

    Args:
        beta: Scale of the rewards; positive.
        gamma: Target margin of the rewards; 0 or more. The paper gives it as the ratio γ/β, about 0.5.
        label_smoothing: Probability that a label is flipped, in [0, 0.5).

    Raises:
        ValueError: If a parameter is outside its range.

    References:
        Meng et al. 2024, arXiv:2405.14734, Eq. 6; defaults from its β = 2.0 and γ/β = 0.5.

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
    """ORPO: supervised fine-tuning on the chosen response, plus a loss on the odds ratio of the two responses.

    The probability of a response is the geometric mean of its token probabilities. Implicit rewards are log-odds; their
    margin is the paper's log odds ratio. Prompt tokens carry no loss.

    Args:
        weight: Weight of the odds-ratio term (the paper's λ); positive.

    Raises:
        ValueError: If ``weight`` is not positive.

    References:
        Hong et al. 2024, arXiv:2403.07691, Eqs. 4, 6 and 7; default λ from the paper.

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
    """CPO: DPO with a uniform reference, plus supervised fine-tuning on the chosen response.

    Args:
        beta: Scale of the rewards; positive.
        alpha: Weight of the fine-tuning term; 0 or more. The term is averaged per token, as in the authors' code.
        label_smoothing: Probability that a label is flipped, in [0, 0.5).

    Raises:
        ValueError: If a parameter is outside its range.

    References:
        Xu et al. 2024, arXiv:2401.08417, Eq. 3 and L_NLL; default β from the paper.

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
    """log(p / (1 - p)), given log p."""
    mean = mean.clamp(max=LARGEST_MEAN)
    return mean - torch.log(-torch.expm1(mean))
