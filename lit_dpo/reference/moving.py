"""TR-DPO: a reference that follows the policy."""

import torch

from lit_dpo.data.batch import PairBatch
from lit_dpo.objectives import PairLogps
from lit_dpo.policy.adapters import MOVING_ADAPTER, belongs_to, trained_counterpart
from lit_dpo.policy.policy import Policy
from lit_dpo.reference.base import Reference


class MovingReference(Reference):
    """TR-DPO: a copy of the adapters that follows the trained ones.

    Every τ optimizer steps, θ_ref ← α·θ + (1 - α)·θ_ref. Soft updates have α < 1 and τ = 1. Hard updates have α = 1 and
    a larger τ. θ are the adapters' matrices A and B. Mixing A and B differs from mixing their product BA by
    α(1 - α)(B - B_ref)(A - A_ref). This is a second-order term, zero for hard updates. Checkpoints include the copy.
    Held-out metrics use the current copy, so their values at different steps cannot be compared.

    Args:
        alpha: Share of the policy in the mixture, in (0, 1].
        tau: Optimizer steps between two updates.
        cached: Must be false: the log-probs change with each update.

    Raises:
        ValueError: If an argument is outside its range.

    References:
        Gorbatovski et al. 2024, arXiv:2404.09656, Section 3. It uses α = 0.6 for soft updates, τ = 512 for hard ones.
    """

    policy: Policy

    def __init__(self, alpha: float = 0.6, tau: int = 1, cached: bool = False) -> None:
        if cached:
            raise ValueError(
                "model.reference.cached: a moving reference cannot be cached, as its log-probs change with each update."
            )
        if not 0 < alpha <= 1:
            raise ValueError(f"model.reference.alpha must lie in (0, 1], not {alpha}.")
        if tau < 1:
            raise ValueError(f"model.reference.tau must be at least 1, not {tau}.")
        self.alpha, self.tau, self.cached = alpha, tau, cached

    def logps(self, batch: PairBatch) -> PairLogps:
        """Log-probs of P pairs, without gradients."""
        with self.policy.frozen(MOVING_ADAPTER):
            return batch.sum_responses(self.policy.token_logps(batch).logps)

    @torch.no_grad()
    def end_step(self, step: int) -> None:
        """Updates the copy in place at every τ-th step."""
        if step % self.tau:
            return
        parameters = dict(self.policy.model.named_parameters())
        for name, parameter in parameters.items():
            if belongs_to(name, MOVING_ADAPTER):
                parameter.lerp_(parameters[trained_counterpart(name)], self.alpha)
