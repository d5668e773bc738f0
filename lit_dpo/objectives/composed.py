"""Objectives built from others: mixtures, and wrappers that change the log-probs or weight the pairs."""

import torch
from torch import Tensor, nn

from lit_dpo.objectives.anchored import BCOPair
from lit_dpo.objectives.base import Objective, PairLogps, Responses, Rewards, within
from lit_dpo.objectives.dpo import Sigmoid
from lit_dpo.objectives.reference_free import SFT


class Mixture(Objective):
    """A weighted sum of objectives. Its implicit rewards are those of the first objective.

    Args:
        objectives: The objectives to add up; by default MPO's: ``Sigmoid``, ``BCOPair`` with the same β, and ``SFT``.
        weights: One weight per objective, each 0 or more. By default MPO's 0.8, 0.2 and 1.0 for the default objectives,
            and 1 each for given ones.

    Raises:
        ValueError: If there are no objectives, if their number is not that of the weights, or if a weight is negative.

    References:
        Wang et al. 2024, arXiv:2411.10442 (MPO); default weights from the paper.

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
                f"objective.weights has {len(self.weights)} numbers for {len(objectives)} objectives. Give one for "
                "each objective."
            )
        for weight in self.weights:
            within("weights", weight, 0, float("inf"))
        self.uses_reference = any(part.uses_reference for part in objectives)
        self.uses_statistics = any(part.uses_statistics for part in objectives)
        self.uses_scores = any(part.uses_scores for part in objectives)
        self.ranks_lists = all(part.ranks_lists for part in objectives)
        self.pairwise = all(part.pairwise for part in objectives)

    def rewards(self, policy: PairLogps, reference: PairLogps) -> Rewards:
        """The implicit rewards of the first objective."""
        rewards: Rewards = self.objectives[0].rewards(policy, reference)  # type: ignore[operator]
        return rewards

    def forward(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """The loss of each pair, (P,)."""
        losses = [objective(policy, reference) for objective in self.objectives]
        return torch.stack([weight * loss for weight, loss in zip(self.weights, losses, strict=True)]).sum(0)

    def end_step(self, kept: bool = True) -> None:
        """Ends the step in each objective."""
        for objective in self.objectives:
            objective.end_step(kept)  # type: ignore[operator]


class RPO(Mixture):
    """Iterative RPO: DPO plus α times supervised fine-tuning, averaged per token, on the chosen response.

    The paper puts α on the DPO term instead. At the paper's value, α = 1, both are the same.

    Args:
        beta: Strength of the pull towards the reference; positive.
        alpha: Weight of the fine-tuning term; 0 or more.

    Raises:
        ValueError: If a parameter is outside its range.

    References:
        Pang et al. 2024, arXiv:2404.19733, Eq. 1; default β and α from the paper.

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
    """An objective that wraps another one. It needs and supports what the wrapped objective does.

    Args:
        objective: The wrapped objective; by default ``Sigmoid``.
    """

    def __init__(self, objective: Objective | None = None) -> None:
        super().__init__()
        self.objective: Objective = Sigmoid() if objective is None else objective
        for name in ("uses_reference", "uses_statistics", "uses_scores", "ranks_lists", "pairwise"):
            setattr(self, name, getattr(self.objective, name))

    def require_pairwise(self, what: str) -> None:
        """Checks that each loss of the wrapped objective belongs to a single pair of responses.

        Args:
            what: What the wrapper computes for each pair, for the message.

        Raises:
            ValueError: If the objective mixes pairs, or ranks lists.
        """
        name = type(self.objective).__name__
        if not self.pairwise:
            raise ValueError(
                f"{type(self).__name__} cannot wrap {name}: its losses do not belong to single pairs (AOT sorts the "
                f"batch), so a pair's {what} would apply to other pairs."
            )
        if self.ranks_lists:
            raise ValueError(
                f"{type(self).__name__} cannot wrap {name}: its {what} are defined for pairs, not for ranked lists."
            )

    def rewards(self, policy: PairLogps, reference: PairLogps) -> Rewards:
        """The implicit rewards of the wrapped objective."""
        return self.objective.rewards(policy, reference)

    def end_step(self, kept: bool = True) -> None:
        """Ends the step in the wrapped objective."""
        self.objective.end_step(kept)


class WPO(Wrapper):
    """WPO: weights each pair by how likely the policy is to write its two responses.

    This makes off-policy data act more like on-policy data.

    Per token, take log p(token) - log Σ p². The weight of a response is the exponential of the mean over its tokens.
    The weight of a pair is the product of its two weights. Weights carry no gradient. They count every token fully,
    even if the wrapped objective is ``LDDPO``, which changes the log-probs.

    Args:
        objective: The objective to weight; by default ``Sigmoid``.

    Raises:
        ValueError: If a loss of the objective does not belong to a single pair of responses.

    References:
        Zhou et al. 2024, arXiv:2406.11827, Eq. 2 with sampled alignment.
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
            ValueError: If the policy's log-probs come without token statistics.
        """
        responses = policy.responses
        if responses is None or responses.statistics is None:
            raise ValueError("WPO needs token statistics of the policy (PairLogps.responses.statistics).")
        aligned = responses.sum(responses.token_logps.detach() - responses.statistics.log_sum_squares)
        chosen, rejected = responses.best_and_worst(aligned)
        return (chosen / policy.chosen_lengths + rejected / policy.rejected_lengths).exp()


class LDDPO(Wrapper):
    """LD-DPO: scales the log-probs of tokens beyond the shorter response's length by α, for policy and reference.

    Objectives that average over a response still divide by its full number of tokens.

    Args:
        alpha: Weight of the tokens by which the longer response exceeds the shorter one, in [0, 1]. 1 changes nothing;
            0 leaves these tokens out. The paper tunes it for each model; the default is the middle of the range.
        objective: The objective that gets the changed log-probs; by default ``Sigmoid``. To weight the pairs as well,
            wrap ``LDDPO`` in ``WPO``.

    Raises:
        ValueError: If α is outside its range, or if the objective uses token statistics or ranks lists.

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
            raise ValueError(f"LDDPO cannot wrap {inside}, whose weights count all tokens. Wrap LDDPO in WPO instead.")
        if self.ranks_lists:
            raise ValueError(f"LDDPO cannot wrap {inside}: it supports pairs only, not ranked lists.")
        self.alpha = within("alpha", alpha, 0, 1, "[]")

    def rewards(self, policy: PairLogps, reference: PairLogps) -> Rewards:
        """The implicit rewards of the wrapped objective, for the changed log-probs."""
        return self.objective.rewards(self.shortened(policy), self.shortened(reference))

    def forward(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """The loss of each pair, (P,)."""
        return self.objective(self.shortened(policy), self.shortened(reference))

    def shortened(self, logps: PairLogps) -> PairLogps:
        """The log-probs, with weight α on the tokens beyond the length of the shorter response.

        Raises:
            ValueError: If there are no log-probs per token, or if there are ranked lists.
        """
        if logps.responses is None:
            raise ValueError("LDDPO needs log-probs per token (PairLogps.responses).")
        if any(count != 2 for count in logps.responses.counts):
            raise ValueError("LDDPO supports pairs only, not ranked lists.")
        weights = _weights(logps.responses, self.alpha)
        responses = logps.responses._replace(token_logps=weights * logps.responses.token_logps)
        chosen, rejected = responses.best_and_worst(responses.sum(responses.token_logps))
        return logps._replace(chosen=chosen, rejected=rejected, responses=responses)


def _weights(responses: Responses, alpha: float) -> Tensor:
    """The weight of each token, (R,): 1 up to the length of the shorter response of its pair, α beyond it."""
    weights: list[float] = []
    for chosen, rejected in zip(responses.lengths[0::2], responses.lengths[1::2], strict=True):
        shared = min(chosen, rejected)
        for length in (chosen, rejected):
            weights += [1.0] * shared + [alpha] * (length - shared)
    return responses.token_logps.new_tensor(weights)
