"""Objectives of ranked lists of more than two responses."""

import torch
from torch import Tensor

from lit_dpo.objectives.base import LogRatioObjective, PairLogps, Rewards, wins


class PlackettLuce(LogRatioObjective):
    """DPO on rankings: the model picks the best response among all, the second-best among the rest, and so on.

    With two responses it is DPO. Rewards are reported for the best and for the worst response. The metric
    ``rewards/accuracies`` is the share of all pairs in a list that the rewards order correctly.

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
        """Implicit rewards β·log(π/π_ref) of the best and worst response, and the share of pairs ordered correctly."""
        shares = []
        for rewards in self._lists(policy, reference):
            better, worse = torch.triu_indices(len(rewards), len(rewards), 1, device=rewards.device)
            shares.append(wins(rewards[better] - rewards[worse]).mean())
        return super().rewards(policy, reference)._replace(ordered=torch.stack(shares).detach())

    def forward(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """The loss of each list, (P,)."""
        losses = []
        for rewards in self._lists(policy, reference):
            remaining = rewards.flip(0).logcumsumexp(0).flip(0)  # log-sum-exp over each response and all worse ones
            losses.append((remaining - rewards)[:-1].sum())
        return torch.stack(losses)

    def _lists(self, policy: PairLogps, reference: PairLogps) -> list[Tensor]:
        """Implicit rewards of all responses of each list, best response first."""
        ours, theirs = policy.responses, reference.responses
        if ours is None or theirs is None:
            both = super().rewards(policy, reference)
            return list(torch.stack([both.chosen, both.rejected], 1))
        rewards = self.beta * (ours.sum(ours.token_logps) - theirs.sum(theirs.token_logps))
        return list(rewards.split(ours.counts))
