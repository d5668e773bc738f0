"""Objectives made of others: weighted mixtures, and changes to the log-probs or the weights that another one sees."""

import torch
from torch import Tensor, nn

from lit_dpo.objectives.anchored import BCOPair
from lit_dpo.objectives.base import Objective, PairLogps, Responses, Rewards, within
from lit_dpo.objectives.dpo import Sigmoid
from lit_dpo.objectives.reference_free import SFT


class Mixture(Objective):
    """A weighted sum of objectives. Implicit rewards are those of the first.

    Args:
        objectives: Which ones; by default MPO's: ``Sigmoid``, ``BCOPair`` with the same β, ``SFT``.
        weights: A weight for each, 0 or more; by default MPO's 0.8, 0.2 and 1.0, or 1 each of others.

    Raises:
        ValueError: If there is not one weight for each, or one is negative.

    References:
        Wang et al. 2024, arXiv:2411.10442 (MPO), with its weights.

    Example:
        >>> policy = PairLogps.from_sums([-10.0], [-12.0], lengths=(4, 2))
        >>> reference = PairLogps.from_sums([-11.0], [-11.0])
        >>> Mixture([Sigmoid(0.5), SFT()], [1.0, 0.1])(policy, reference)  # 0.3133 + 0.1 * 2.5
        tensor([0.5633])
    """

    def __init__(self, objectives: list[Objective] | None = None, weights: list[float] | None = None) -> None:
        super().__init__()
        if objectives is None:
            objectives = [Sigmoid(), BCOPair(beta=0.1), SFT()]
            weights = [0.8, 0.2, 1.0] if weights is None else weights
        self.weights = [1.0] * len(objectives) if weights is None else list(weights)
        self.objectives = nn.ModuleList(objectives)
        if not objectives or len(objectives) != len(self.weights):
            raise ValueError(
                f"objective.weights has {len(self.weights)} numbers for {len(objectives)} objectives: give one each."
            )
        for weight in self.weights:
            within("weights", weight, 0, float("inf"))
        self.uses_reference = any(part.uses_reference for part in objectives)
        self.uses_statistics = any(part.uses_statistics for part in objectives)
        self.uses_scores = any(part.uses_scores for part in objectives)
        self.ranks_lists = all(part.ranks_lists for part in objectives)
        self.pairwise = all(part.pairwise for part in objectives)

    def rewards(self, policy: PairLogps, reference: PairLogps) -> Rewards:
        """Those of the first objective."""
        rewards: Rewards = self.objectives[0].rewards(policy, reference)  # type: ignore[operator]
        return rewards

    def forward(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """The loss of each pair, (P,)."""
        losses = [objective(policy, reference) for objective in self.objectives]
        return torch.stack([weight * loss for weight, loss in zip(self.weights, losses, strict=True)]).sum(0)

    def end_step(self, kept: bool = True) -> None:
        """Tells each."""
        for objective in self.objectives:
            objective.end_step(kept)  # type: ignore[operator]


class RPO(Mixture):
    """Iterative RPO: DPO, and supervised fine-tuning on the chosen response, per token, with the weight α.

    The paper puts α on DPO's term instead; at its value, 1, both are the same.

    Args:
        beta: Strength of the pull towards the reference; positive.
        alpha: Weight of the fine-tuning; 0 or more.

    Raises:
        ValueError: If a parameter is outside its range.

    References:
        Pang et al. 2024, arXiv:2404.19733, Eq. 1, with its β and α.

    Example:
        >>> policy = PairLogps.from_sums([-10.0], [-12.0], lengths=(4, 2))
        >>> reference = PairLogps.from_sums([-11.0], [-11.0])
        >>> RPO(beta=0.5)(policy, reference)  # 0.3133 + 2.5
        tensor([2.8133])
    """

    def __init__(self, beta: float = 0.1, alpha: float = 1.0) -> None:
        super().__init__([Sigmoid(beta), SFT()], [1.0, within("alpha", alpha, 0, float("inf"))])
        self.beta, self.alpha = beta, alpha


class Wrapper(Objective):
    """An objective around another one, with all that the other asks for.

    Args:
        objective: The other one; by default ``Sigmoid``.
    """

    def __init__(self, objective: Objective | None = None) -> None:
        super().__init__()
        self.objective: Objective = Sigmoid() if objective is None else objective
        for name in ("uses_reference", "uses_statistics", "uses_scores", "ranks_lists", "pairwise"):
            setattr(self, name, getattr(self.objective, name))

    def require_pairwise(self, what: str) -> None:
        """Refuses objectives whose losses do not belong to one pair of responses each.

        Raises:
            ValueError: Saying why ``what`` would have no meaning.
        """
        name = type(self.objective).__name__
        if not self.pairwise:
            raise ValueError(
                f"{type(self).__name__} cannot hold {name}: its losses are not of single pairs (AOT sorts the batch), "
                f"so a pair's {what} would fall on others."
            )
        if self.ranks_lists:
            raise ValueError(
                f"{type(self).__name__} cannot hold {name}: its {what} are of two responses, not of a list."
            )

    def rewards(self, policy: PairLogps, reference: PairLogps) -> Rewards:
        """Those of the objective inside."""
        return self.objective.rewards(policy, reference)

    def end_step(self, kept: bool = True) -> None:
        """Tells the objective inside."""
        self.objective.end_step(kept)


class WPO(Wrapper):
    """WPO: pairs weigh as much as their responses are like the policy's own, so that old data counts as if on-policy.

    The weight of a response is exp of the mean over its tokens of log p(token) - log Σ p², without a gradient; that of
    a pair the product of both. The weights are of all tokens, whatever ``LDDPO`` inside does to the log-probs.

    Args:
        objective: The objective that is weighted; by default ``Sigmoid``.

    Raises:
        ValueError: If the objective's losses are not of single pairs.

    References:
        Zhou et al. 2024, arXiv:2406.11827, Eq. 2 with its sampled alignment.
    """

    def __init__(self, objective: Objective | None = None) -> None:
        super().__init__(objective)
        self.require_pairwise("weights")
        self.uses_statistics = True

    def forward(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """The loss of each pair, (P,)."""
        return self.weights(policy) * self.objective(policy, reference)

    def weights(self, policy: PairLogps) -> Tensor:
        """The weight of each pair, (P,), without a gradient.

        Raises:
            ValueError: If the policy does not tell statistics of its tokens.
        """
        responses = policy.responses
        if responses is None or responses.statistics is None:
            raise ValueError("WPO needs the statistics of the policy's tokens: PairLogps.responses.statistics.")
        aligned = responses.sum(responses.token_logps.detach() - responses.statistics.log_sum_squares)
        chosen, rejected = responses.best_and_worst(aligned)
        return (chosen / policy.chosen_lengths + rejected / policy.rejected_lengths).exp()


class LDDPO(Wrapper):
    """LD-DPO: tokens beyond the length that both responses share weigh α instead of 1, in policy and reference.

    Objectives that average over a response still divide by the number of all its tokens.

    Args:
        alpha: In [0, 1]; 1 changes nothing, 0 leaves those tokens out. The paper tunes it for each model; this default
            is the middle of its range.
        objective: The objective that sees these log-probs; by default ``Sigmoid``. To be weighted too: WPO around this.

    Raises:
        ValueError: If α is outside its range, or the objective's losses are not of pairs.

    References:
        Liu et al. 2024, arXiv:2409.06411.

    Example:
        >>> policy = PairLogps.from_sums([-10.0], [-12.0], lengths=(4, 2))
        >>> reference = PairLogps.from_sums([-11.0], [-11.0])
        >>> reference = PairLogps.from_sums([-12.0], [-11.0], lengths=(4, 2))
        >>> LDDPO(alpha=0.0)(policy, reference)  # chosen: half of -10 and half of -12
        tensor([0.5981])
    """

    def __init__(self, alpha: float = 0.5, objective: Objective | None = None) -> None:
        super().__init__(objective)
        inside = type(self.objective).__name__
        if self.uses_statistics:
            raise ValueError(f"LDDPO cannot hold {inside}: its weights are of all tokens. Put WPO around LDDPO.")
        if self.ranks_lists:
            raise ValueError(f"LDDPO cannot hold {inside}: lists share no length of two responses.")
        self.alpha = within("alpha", alpha, 0, 1, "[]")

    def rewards(self, policy: PairLogps, reference: PairLogps) -> Rewards:
        """Those of the objective inside."""
        return self.objective.rewards(self.shortened(policy), self.shortened(reference))

    def forward(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """The loss of each pair, (P,)."""
        return self.objective(self.shortened(policy), self.shortened(reference))

    def shortened(self, logps: PairLogps) -> PairLogps:
        """The log-probs with the weight α on what one response is longer than the other.

        Raises:
            ValueError: If they do not come token by token.
        """
        if logps.responses is None:
            raise ValueError("LDDPO needs log-probs token by token: PairLogps.responses.")
        if any(count != 2 for count in logps.responses.counts):
            raise ValueError("LDDPO takes pairs; lists share no length of two responses.")
        weights = _weights(logps.responses, self.alpha)
        responses = logps.responses._replace(token_logps=weights * logps.responses.token_logps)
        chosen, rejected = responses.best_and_worst(responses.sum(responses.token_logps))
        return logps._replace(chosen=chosen, rejected=rejected, responses=responses)


def _weights(responses: Responses, alpha: float) -> Tensor:
    """1 for each token up to the length that both responses of its pair have, α beyond it, (R,)."""
    weights: list[float] = []
    for chosen, rejected in zip(responses.lengths[0::2], responses.lengths[1::2], strict=True):
        shared = min(chosen, rejected)
        for length in (chosen, rejected):
            weights += [1.0] * shared + [alpha] * (length - shared)
    return responses.token_logps.new_tensor(weights)
