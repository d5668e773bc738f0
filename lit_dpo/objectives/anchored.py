"""Losses that hold the reward of each response, not only their difference, against an anchor."""

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
        Chen et al. 2024, arXiv:2402.05369, Section 4.1 with two responses and hard labels; β of its Appendix C.

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
    """BCO on pairs: a binary classifier of chosen and rejected responses, whose logit is the reward less a shift δ.

    δ is the mean reward of all responses trained on in the optimizer steps before, over all processes: it starts at 0,
    as the rewards do, and does not depend on how a step is divided into batches. It is kept in checkpoints; evaluation
    uses it and does not move it.

    Args:
        beta: Strength of the pull towards the reference; positive.
        shift: ``running``, the paper's; ``none`` is what TRL calls ``bco_pair``.

    Raises:
        ValueError: If a parameter is outside its range.

    References:
        Jung et al. 2024, arXiv:2404.04656, Section 4, with β of its Appendix C.

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
        if shift == "running":  # sum and number of log-ratios: of all steps that are done, and of the one that is not
            self.register_buffer("seen", torch.zeros(2, dtype=torch.float64))
            self.register_buffer("step", torch.zeros(2, dtype=torch.float64), persistent=False)

    @property
    def delta(self) -> Tensor | float:
        """The reward that lies between good and bad."""
        return self.beta * self.seen[0] / self.seen[1].clamp(min=1) if self.shift == "running" else 0.0

    def forward(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """The loss of each pair, (P,)."""
        chosen, rejected, _ = self.rewards(policy, reference)
        if self.shift == "running" and chosen.requires_grad:
            both = torch.cat([chosen, rejected]).detach().double() / self.beta
            self.step += torch.stack([both.sum(), both.new_tensor(both.numel())])
        return -logsigmoid(chosen - self.delta) - logsigmoid(self.delta - rejected)

    def end_step(self, kept: bool = True) -> None:
        """Moves δ, by the rewards of all processes."""
        if self.shift == "none":
            return
        if kept:
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(self.step)
            self.seen += self.step
        self.step.zero_()


class SPPOHard(LogRatioObjective):
    """SPPO with hard labels: the log-ratio of the winner is to be 1/(2β), that of the loser -1/(2β).

    Args:
        beta: Strength of the pull towards the reference, 1/η of the paper; positive.

    Raises:
        ValueError: If ``beta`` is not positive.

    References:
        Wu et al. 2024, arXiv:2405.00675, Eq. 4.7 with P = 1 for the winner and 0 for the loser, and its η = 1e3.

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
    """APO-zero: raises the chosen and lowers the rejected response, where chosen ones are better than the policy's own.

    Args:
        beta: Strength of the pull towards the reference; positive.

    Raises:
        ValueError: If ``beta`` is not positive.

    References:
        D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 7, plus the constant 1, so that it is never negative; its β.

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
    """APO-down: lowers both responses, the rejected one more, where chosen ones are worse than the policy's own.

    Args:
        beta: Strength of the pull towards the reference; positive.

    Raises:
        ValueError: If ``beta`` is not positive.

    References:
        D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 8, plus the constant 1, so that it is never negative; its β.

    Example:
        >>> policy, reference = PairLogps.from_sums([-10.0], [-12.0]), PairLogps.from_sums([-11.0], [-11.0])
        >>> APODown(beta=0.5)(policy, reference)
        tensor([0.8914])
    """

    def forward(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """σ(r_chosen) + 1 - σ(r_chosen - r_rejected), (P,)."""
        chosen, rejected, _ = self.rewards(policy, reference)
        return chosen.sigmoid() + (rejected - chosen).sigmoid()
