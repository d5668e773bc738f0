"""Objectives of ranked lists of more than two responses."""

import torch
from torch import Tensor

from lit_dpo.objectives.base import LogRatioObjective, PairLogps, Rewards, wins


class PlackettLuce(LogRatioObjective):
    """DPO on a ranking: the best is to be chosen among all, the second among the rest, and so on.

    With two responses it is DPO. Rewards are told of the best and of the worst response; ``rewards/accuracies`` is the
    share of all pairs of a list that the rewards order rightly.

    Args:
        beta: Strength of the pull towards the reference; positive.

    Raises:
        ValueError: If ``beta`` is not positive.

    References:
        Rafailov et al. 2023, arXiv:2305.18290, Appendix A.3.

    Example:
        >>> policy, reference = PairLogps.from_sums([-10.0], [-12.0]), PairLogps.from_sums([-11.0], [-11.0])
        >>> PlackettLuce(beta=0.5)(policy, reference)
        tensor([0.3133])
    """

    ranks_lists = True

    def rewards(self, policy: PairLogps, reference: PairLogps) -> Rewards:
        """The implicit rewards β·log(π/π_ref) of best and worst, and how well they order the whole list."""
        shares = []
        for rewards in self._lists(policy, reference):
            better, worse = torch.triu_indices(len(rewards), len(rewards), 1, device=rewards.device)
            shares.append(wins(rewards[better] - rewards[worse]).mean())
        return super().rewards(policy, reference)._replace(ordered=torch.stack(shares).detach())

    def forward(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """The loss of each list, (P,)."""
        losses = []
        for rewards in self._lists(policy, reference):
            remaining = rewards.flip(0).logcumsumexp(0).flip(0)  # of each rank and all below it
            losses.append((remaining - rewards)[:-1].sum())
        return torch.stack(losses)

    def _lists(self, policy: PairLogps, reference: PairLogps) -> list[Tensor]:
        """Rewards of all responses of each list, best first."""
        ours, theirs = policy.responses, reference.responses
        if ours is None or theirs is None:
            both = super().rewards(policy, reference)
            return list(torch.stack([both.chosen, both.rejected], 1))
        rewards = self.beta * (ours.sum(ours.token_logps) - theirs.sum(theirs.token_logps))
        return list(rewards.split(ours.counts))
