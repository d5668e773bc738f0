"""Losses that compare the reward of each response with an anchor, not only the two rewards with each other."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_dpo.objectives.base import LogRatioObjective, PairLogps


class NCAPair(LogRatioObjective):
    """NCA on pairs: noise contrastive estimation of the reward of each response.

    Args:
        beta: Strength of the pull towards the reference (the paper's α); positive.

    Raises:
        ValueError: If ``beta`` is not positive.

    References:
        Chen et al. 2024, arXiv:2402.05369, Section 4.1 for two responses and hard labels; default β from Appendix C.

    Example:
        >>> policy, reference = PairLogps.from_sums([-10.0], [-12.0]), PairLogps.from_sums([-11.0], [-11.0])
        >>> NCAPair(beta=0.5)(policy, reference)
        tensor([1.1982])
    """

    def __init__(self, beta: float = 0.01) -> None:
        super().__init__(beta)

    def forward(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """The loss of each pair, (P,)."""
        chosen, rejected, _ = self.rewards(policy, reference)
        return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


class BCOPair(LogRatioObjective):
    """BCO on pairs: a binary classifier of chosen and rejected responses. Its logit is the reward minus a shift δ.

    δ is the mean reward of all responses in all previous optimizer steps, over all processes. It starts at 0, as the
    rewards do. It does not depend on how a step is divided into batches. Checkpoints store it. Evaluation uses it but
    does not update it.

    Args:
        beta: Strength of the pull towards the reference; positive.
        shift: ``running`` subtracts the running mean reward δ, as in the paper. ``none`` subtracts nothing, as TRL's
            ``bco_pair`` does.

    Raises:
        ValueError: If a parameter is outside its range.

    References:
        Jung et al. 2024, arXiv:2404.04656, Section 4; default β from Appendix C.

    Example:
        >>> policy, reference = PairLogps.from_sums([-10.0], [-12.0]), PairLogps.from_sums([-11.0], [-11.0])
        >>> BCOPair(beta=0.5)(policy, reference)  # 2 * log(1 + exp(-0.5)), δ being 0
        tensor([0.9482])
    """

    seen: Tensor
    step: Tensor

    def __init__(self, beta: float = 0.01, shift: Literal["running", "none"] = "running") -> None:
        super().__init__(beta)
        if shift not in ("running", "none"):
            raise ValueError(f"objective.shift must be 'running' or 'none', not {shift!r}.")
        self.shift = shift
        if shift == "running":  # sum and count of log-ratios: over all finished steps, and over the current step
            self.register_buffer("seen", torch.zeros(2, dtype=torch.float64))
            self.register_buffer("step", torch.zeros(2, dtype=torch.float64), persistent=False)

    @property
    def delta(self) -> Tensor | float:
        """The shift δ: the reward at which the classifier is undecided."""
        return self.beta * self.seen[0] / self.seen[1].clamp(min=1) if self.shift == "running" else 0.0

    def forward(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """The loss of each pair, (P,)."""
        chosen, rejected, _ = self.rewards(policy, reference)
        if self.shift == "running" and chosen.requires_grad:
            both = torch.cat([chosen, rejected]).detach().double() / self.beta
            self.step += torch.stack([both.sum(), both.new_tensor(both.numel())])
        return -logsigmoid(chosen - self.delta) - logsigmoid(self.delta - rejected)

    def end_step(self, kept: bool = True) -> None:
        """Updates δ with the rewards of all processes."""
        if self.shift == "none":
            return
        if kept:
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(self.step)
            self.seen += self.step
        self.step.zero_()


class SPPOHard(LogRatioObjective):
    """SPPO with hard labels: the target log-ratio is 1/(2β) for the winner and -1/(2β) for the loser.

    Args:
        beta: Strength of the pull towards the reference (the paper's 1/η); positive.

    Raises:
        ValueError: If ``beta`` is not positive.

    References:
        Wu et al. 2024, arXiv:2405.00675, Eq. 4.7 with P = 1 for the winner and 0 for the loser; default β from its
        η = 1e3.

    Example:
        >>> policy, reference = PairLogps.from_sums([-10.0], [-12.0]), PairLogps.from_sums([-11.0], [-11.0])
        >>> SPPOHard(beta=0.25)(policy, reference)  # (1 - 2)² + (-1 + 2)²
        tensor([2.])
    """

    def __init__(self, beta: float = 0.001) -> None:
        super().__init__(beta)

    def forward(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """The loss of each pair, (P,)."""
        target = 0.5 / self.beta
        winner, loser = policy.chosen - reference.chosen, policy.rejected - reference.rejected
        return (winner - target).square() + (loser + target).square()


class APOZero(LogRatioObjective):
    """APO-zero: raises the reward of the chosen response and lowers that of the rejected one.

    It is meant for data whose chosen responses are better than the policy's own.

    Args:
        beta: Strength of the pull towards the reference; positive.

    Raises:
        ValueError: If ``beta`` is not positive.

    References:
        D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 7, plus 1, so that the loss is never negative; default β
        from the paper.

    Example:
        >>> policy, reference = PairLogps.from_sums([-10.0], [-12.0]), PairLogps.from_sums([-11.0], [-11.0])
        >>> APOZero(beta=0.5)(policy, reference)
        tensor([0.7551])
    """

    def forward(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """1 - σ(r_chosen) + σ(r_rejected), (P,)."""
        chosen, rejected, _ = self.rewards(policy, reference)
        return (-chosen).sigmoid() + rejected.sigmoid()


class APODown(LogRatioObjective):
    """APO-down: lowers the rewards of both responses, that of the rejected one more.

    It is meant for data whose chosen responses are worse than the policy's own.

    Args:
        beta: Strength of the pull towards the reference; positive.

    Raises:
        ValueError: If ``beta`` is not positive.

    References:
        D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 8, plus 1, so that the loss is never negative; default β
        from the paper.

    Example:
        >>> policy, reference = PairLogps.from_sums([-10.0], [-12.0]), PairLogps.from_sums([-11.0], [-11.0])
        >>> APODown(beta=0.5)(policy, reference)
        tensor([0.8914])
    """

    def forward(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """σ(r_chosen) + 1 - σ(r_chosen - r_rejected), (P,)."""
        chosen, rejected, _ = self.rewards(policy, reference)
        return chosen.sigmoid() + (rejected - chosen).sigmoid()
