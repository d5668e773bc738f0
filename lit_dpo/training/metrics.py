"""Losses, log-probs and rewards of pairs ──► logged metrics: means over all pairs of all ranks, and quantiles."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_dpo.objectives import PairLogps, Responses, Rewards

QUANTILES = (0.1, 0.5, 0.9)


def token_kl(policy: Responses, reference: Responses) -> Tensor:
    """An estimate of the KL divergence between policy and reference at each response token, (R,), in nats.

    The estimate is ½(log π - log π_ref)², the second-order expansion of both directions of the divergence about
    π = π_ref. It is never negative, and no single token makes it explode. The tokens come from the data; neither policy
    nor reference sampled them. The estimate therefore measures how far the policy has moved on this data, not on its
    own samples.

    References:
        Schulman 2020, "Approximating KL Divergence", estimator k2.
    """
    return (policy.token_logps - reference.token_logps).detach().square() / 2


class PreferenceMetrics(Metric):
    """Means over pairs, and quantiles of rewards.

    Totals are summed in float64 and divided once, so batches and ranks of unequal size are weighted correctly.

    Metric names are those of TRL where TRL has the metric:

    - ``loss``;
    - ``rewards/chosen``, ``rewards/rejected``, ``rewards/margins`` (implicit rewards), with their quantiles as
      ``rewards/margins_q10`` and so on;
    - ``rewards/accuracies``, the share of pairs whose chosen response has the higher reward, a tie counting 0.5;
      ``rewards/negative_margins``, the share of pairs whose rejected response has the higher reward;
    - ``logps/chosen``, ``logps/rejected``, log-probs summed over the response, in nats; ``logps/chosen_per_token`` and
      ``logps/rejected_per_token``, log-probs averaged over its tokens;
    - ``lengths/chosen``, ``lengths/rejected``, in tokens.

    With a reference:

    - ``displacement/chosen``, ``displacement/rejected``, the policy's log-prob minus the reference's, in nats per
      token. If it is negative, the response has become less likely (likelihood displacement; Razin et al. 2024,
      arXiv:2410.08847);
    - ``kl``, the mean of ``token_kl`` over all response tokens.

    With token statistics of the policy:

    - ``entropy``, the mean over all response tokens, in nats;
    - ``mean_token_accuracy``, the share of tokens of chosen responses that are the most likely token.
    """

    full_state_update = False
    names = (
        "loss",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "rewards/negative_margins",
        "logps/chosen",
        "logps/rejected",
        "logps/chosen_per_token",
        "logps/rejected_per_token",
        "lengths/chosen",
        "lengths/rejected",
    )
    reference_names = ("displacement/chosen", "displacement/rejected")
    token_names = ("kl", "entropy", "mean_token_accuracy")
    quantiled = ("chosen", "rejected", "margins")
    totals: Tensor
    num_pairs: Tensor
    reference_totals: Tensor
    num_referred: Tensor
    token_totals: Tensor
    num_tokens: Tensor
    rewards: Any

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        sizes = {"totals": len(self.names), "num_pairs": 1, "reference_totals": 2, "num_referred": 1}
        sizes |= {"token_totals": len(self.token_names), "num_tokens": len(self.token_names)}
        for name, size in sizes.items():
            self.add_state(name, torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("rewards", [], dist_reduce_fx="cat")

    def update(self, losses: Tensor, rewards: Rewards, policy: PairLogps, reference: PairLogps | None = None) -> None:
        """Adds P pairs.

        Args:
            losses: Losses of the pairs, (P,).
            rewards: Implicit rewards of the pairs.
            policy: Log-probs under the policy.
            reference: Log-probs under the reference, if there is one.
        """
        margins = rewards.margins
        per_token = (policy.chosen / policy.chosen_lengths, policy.rejected / policy.rejected_lengths)
        columns = [losses, rewards.chosen, rewards.rejected, rewards.accuracies, margins, margins < 0]
        columns += (policy.chosen, policy.rejected, *per_token, policy.chosen_lengths, policy.rejected_lengths)
        self.totals += _sums(*columns)
        self.num_pairs += losses.numel()
        self.rewards.append(torch.stack([rewards.chosen, rewards.rejected, margins], 1).detach().float())
        if reference is not None:
            self.reference_totals += _sums(
                (policy.chosen - reference.chosen) / policy.chosen_lengths,
                (policy.rejected - reference.rejected) / policy.rejected_lengths,
            )
            self.num_referred += losses.numel()
        if policy.responses is not None:
            self._update_tokens(policy.responses, None if reference is None else reference.responses)

    def _update_tokens(self, policy: Responses, reference: Responses | None) -> None:
        if reference is not None:
            self._add_tokens(0, token_kl(policy, reference))
        if policy.statistics is not None:
            best = _best(policy).to(policy.token_logps.device)
            self._add_tokens(1, policy.statistics.entropy)
            self._add_tokens(2, policy.statistics.top1[best])

    def _add_tokens(self, index: int, values: Tensor) -> None:
        self.token_totals[index] += values.double().sum()
        self.num_tokens[index] += values.numel()

    def compute(self) -> dict[str, Tensor]:
        """The mean of each quantity over all pairs of all ranks since the last reset, and the quantiles."""
        means = dict(zip(self.names, self.totals / self.num_pairs, strict=True))
        if self.num_referred > 0:
            means |= zip(self.reference_names, self.reference_totals / self.num_referred, strict=True)
        for name, total, number in zip(self.token_names, self.token_totals, self.num_tokens, strict=True):
            if number > 0:
                means[name] = total / number
        rewards = torch.cat(self.rewards) if isinstance(self.rewards, list) else self.rewards
        for column, name in enumerate(self.quantiled):
            found = _quantiles(rewards[:, column])
            means |= {f"rewards/{name}_q{100 * q:.0f}": value for q, value in zip(QUANTILES, found, strict=True)}
        return means


def _sums(*columns: Tensor) -> Tensor:
    """The sum of each column of P numbers, in float64."""
    return torch.stack([column.detach().double().sum() for column in columns])


def _best(responses: Responses) -> Tensor:
    """True for each token of the best response of its pair, (R,)."""
    is_best = [rank == 0 for count in responses.counts for rank in range(count)]
    return torch.tensor(is_best).repeat_interleave(torch.tensor(responses.lengths))


def _quantiles(values: Tensor) -> Tensor:
    """Linearly interpolated quantiles. ``torch.quantile`` accepts at most 16 million numbers."""
    ordered = values.double().sort().values
    places = torch.tensor(QUANTILES, dtype=torch.float64, device=values.device) * (len(values) - 1)
    low = ordered[places.floor().long()]
    return low + (places - places.floor()) * (ordered[places.ceil().long()] - low)
