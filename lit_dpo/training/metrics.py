"""Losses, log-probs and rewards of pairs ──► logged metrics: means over all pairs of all ranks, and quantiles."""

from collections.abc import Sequence
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

    The state is a table with one row per pair. Sums are taken in float64 over the rows of all ranks and divided once,
    so batches and ranks of unequal size are weighted correctly. One table is gathered in one go.

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
        "rewards/margins",
        "rewards/accuracies",
        "rewards/negative_margins",
        "logps/chosen",
        "logps/rejected",
        "logps/chosen_per_token",
        "logps/rejected_per_token",
        "lengths/chosen",
        "lengths/rejected",
    )
    quantiled = names[1:4]
    optional_names = ("displacement/chosen", "displacement/rejected", "kl", "entropy", "mean_token_accuracy")
    rows: Any

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(
        self,
        losses: Tensor,
        rewards: Rewards,
        policy: PairLogps,
        reference: PairLogps | None = None,
        groups: Sequence[int] = (),
    ) -> None:
        """Adds P pairs.

        Args:
            losses: Losses of the pairs, (P,).
            rewards: Implicit rewards of the pairs.
            policy: Log-probs under the policy.
            reference: Log-probs under the reference, if there is one.
            groups: Number of each pair's group, P entries; by default 0.
        """
        margins = rewards.margins
        per_token = (policy.chosen / policy.chosen_lengths, policy.rejected / policy.rejected_lengths)
        columns = [losses, rewards.chosen, rewards.rejected, margins, rewards.accuracies, margins < 0]
        columns += (policy.chosen, policy.rejected, *per_token, policy.chosen_lengths, policy.rejected_lengths)
        optional = _optional(policy, reference)
        absent = torch.zeros_like(losses)
        for part in (0, 1):  # first the sums of each pair, then the numbers of terms in them
            columns += (optional[name][part] if name in optional else absent for name in self.optional_names)
        columns.append(torch.tensor(groups, device=losses.device) if groups else absent)
        self.rows.append(torch.stack([column.detach().double() for column in columns], 1))

    def compute(self, group_names: Sequence[str] = (), **extra: Tensor) -> dict[str, Tensor]:
        """The mean of each quantity over all pairs of all ranks since the last reset, and the quantiles.

        Args:
            group_names: Names of the groups, by their numbers. The means of each are returned as ``name/quantity``; a
                group without pairs is left out.
            extra: Single numbers that are returned as well.

        Returns:
            Scalars on the CPU. All are moved there at once, because each transfer from a GPU waits for it.
        """
        rows = torch.cat(self.rows) if isinstance(self.rows, list) else self.rows
        means, counts = self._means(rows)
        columns = [self.names.index(name) for name in self.quantiled]
        for q, values in zip(QUANTILES, _quantiles(rows[:, columns[0] : columns[-1] + 1]), strict=True):
            means |= {f"{name}_q{100 * q:.0f}": value for name, value in zip(self.quantiled, values, strict=True)}
        means |= {name: value.detach().double() for name, value in extra.items()}
        found = _on_cpu(means, counts)
        for number, group in enumerate(group_names):
            of_group = rows[rows[:, -1] == number]
            if len(of_group):
                found |= {f"{group}/{name}": mean for name, mean in _on_cpu(*self._means(of_group)).items()}
        return found

    def _means(self, rows: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Means over rows of the table, and the number of terms in those that may be absent."""
        sums, many = rows[:, :-1].sum(0), len(self.optional_names)
        counts = dict(zip(self.optional_names, sums[-many:], strict=True))
        means = dict(zip(self.names, sums / len(rows), strict=False))
        return means | dict(zip(self.optional_names, sums[-2 * many : -many] / sums[-many:], strict=True)), counts


def _on_cpu(values: dict[str, Tensor], counts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scalars on the CPU, without those whose count is 0. All move at once, because a GPU is waited for each time."""
    numbers = torch.stack([*values.values(), *counts.values()]).cpu()
    absent = {name for name, count in zip(counts, numbers[len(values) :].tolist(), strict=True) if not count}
    return {name: value for name, value in zip(values, numbers, strict=False) if name not in absent}


def _optional(policy: PairLogps, reference: PairLogps | None) -> dict[str, tuple[Tensor, Tensor]]:
    """Quantities that need a reference or token statistics: each pair's sum and number of terms, (P,) each."""
    found = {}
    if reference is not None:
        one = torch.ones_like(policy.chosen)
        found["displacement/chosen"] = (policy.chosen - reference.chosen) / policy.chosen_lengths, one
        found["displacement/rejected"] = (policy.rejected - reference.rejected) / policy.rejected_lengths, one
    responses = policy.responses
    if responses is None:
        return found
    if reference is not None and reference.responses is not None:
        found["kl"] = _over_pairs(token_kl(responses, reference.responses), responses)
    if responses.statistics is not None:
        found["entropy"] = _over_pairs(responses.statistics.entropy, responses)
        most_likely, _ = responses.best_and_worst(responses.sum(responses.statistics.top1.double()))
        found["mean_token_accuracy"] = most_likely, policy.chosen_lengths
    return found


def _over_pairs(values: Tensor, responses: Responses) -> tuple[Tensor, Tensor]:
    """The sum of one value per response token, (R,), over the tokens of each pair, and their number, (P,) each."""
    lengths = iter(responses.lengths)
    sizes = [sum(next(lengths) for _ in range(count)) for count in responses.counts]
    parts = values.double().split(sizes)
    return torch.stack([part.sum() for part in parts]), torch.stack([part.new_full((), len(part)) for part in parts])


def _quantiles(values: Tensor) -> list[Tensor]:
    """Linearly interpolated ``QUANTILES`` of each column of (N, K). ``torch.quantile`` takes at most 16 M numbers."""
    ordered = values.sort(0).values
    found = []
    for q in QUANTILES:
        low, share = divmod(q * (len(values) - 1), 1)
        high = min(int(low) + 1, len(values) - 1)
        found.append(ordered[int(low)] + share * (ordered[high] - ordered[int(low)]))
    return found
