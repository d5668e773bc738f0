"""Losses, log-probs and rewards of pairs ──► the numbers that people look at: exact, distributed, sample-weighted."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_dpo.objectives import PairLogps, Rewards


class PreferenceMetrics(Metric):
    """Means over pairs, from float64 totals, so that batches and ranks of unequal size agree.

    Keys are TRL's names: ``loss``; ``rewards/chosen``, ``rewards/rejected``, ``rewards/margins`` (implicit rewards);
    ``rewards/accuracies``, the share of pairs whose chosen response has the higher reward, a tie counting half;
    ``logps/chosen``, ``logps/rejected`` (summed over the response, nats). Where the policy tells statistics of its
    tokens, also their means over tokens: ``entropy`` of all response tokens (nats), and ``mean_token_accuracy``, the
    share of the chosen responses' tokens that were the most likely ones.
    """

    full_state_update = False
    names = (
        "loss",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
    )
    token_names = ("entropy", "mean_token_accuracy")
    totals: Tensor
    num_pairs: Tensor
    token_totals: Tensor
    num_tokens: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("totals", torch.zeros(len(self.names), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_pairs", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("token_totals", "num_tokens"):
            self.add_state(name, torch.zeros(len(self.token_names), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, losses: Tensor, rewards: Rewards, policy: PairLogps) -> None:
        """Adds P pairs: their losses (P,), implicit rewards and the policy's log-probs."""
        margins = rewards.margins.double()
        accuracies = torch.where(margins == 0, 0.5, (margins > 0).double())
        columns = (losses, rewards.chosen, rewards.rejected, accuracies, margins, policy.chosen, policy.rejected)
        self.totals += torch.stack([column.detach().double().sum() for column in columns])
        self.num_pairs += losses.numel()
        if policy.statistics is not None:
            lengths = torch.stack([policy.chosen_lengths, policy.rejected_lengths], 1).flatten()
            is_chosen = torch.arange(len(lengths), device=lengths.device).remainder(2).eq(0).repeat_interleave(lengths)
            entropy, top1 = policy.statistics.entropy.double(), policy.statistics.top1[is_chosen].double()
            self.token_totals += torch.stack([entropy.sum(), top1.sum()])
            self.num_tokens += torch.tensor([entropy.numel(), top1.numel()], device=entropy.device)

    def compute(self) -> dict[str, Tensor]:
        """The mean of each quantity over all pairs of all ranks since the last reset."""
        means = dict(zip(self.names, self.totals / self.num_pairs, strict=True))
        if self.num_tokens[0] > 0:
            means |= zip(self.token_names, self.token_totals / self.num_tokens, strict=True)
        return means
