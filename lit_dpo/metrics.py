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
    ``logps/chosen``, ``logps/rejected`` (summed over the response, nats).
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
    totals: Tensor
    num_pairs: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("totals", torch.zeros(len(self.names), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_pairs", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, losses: Tensor, rewards: Rewards, policy: PairLogps) -> None:
        """Adds P pairs: their losses (P,), implicit rewards and the policy's log-probs."""
        margins = rewards.margins.double()
        accuracies = torch.where(margins == 0, 0.5, (margins > 0).double())
        columns = (losses, rewards.chosen, rewards.rejected, accuracies, margins, policy.chosen, policy.rejected)
        self.totals += torch.stack([column.detach().double().sum() for column in columns])
        self.num_pairs += losses.numel()

    def compute(self) -> dict[str, Tensor]:
        """The mean of each quantity over all pairs of all ranks since the last reset."""
        return dict(zip(self.names, self.totals / self.num_pairs, strict=True))
