"""Other losses of the margin of implicit rewards: squares, hinges, KL divergences, and one found by search."""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_dpo.objectives.base import PairLogps, Rewards, positive, within
from lit_dpo.objectives.divergences import Divergence
from lit_dpo.objectives.dpo import MarginObjective, logistic


class Hinge(MarginObjective):
    """SLiC's hinge loss on the margin of implicit rewards: nothing is learned from pairs with a margin above 1.

    Args:
        beta: Strength of the pull towards the reference; positive.
        divergence: What holds the policy to the reference; by default the reverse KL divergence.

    Raises:
        ValueError: If a parameter is outside its range.

    References:
        Zhao et al. 2023, arXiv:2305.10425 (SLiC-HF), Section 2; against a reference: Liu et al. 2023, arXiv:2309.06657
        (RSO's hinge-norm), with its γ as β.

    Example:
        >>> policy, reference = PairLogps.from_sums([-10.0], [-12.0]), PairLogps.from_sums([-11.0], [-11.0])
        >>> Hinge(beta=0.25)(policy, reference)  # 1 - 0.25 * 2
        tensor([0.5000])
    """

    def __init__(self, beta: float = 0.05, divergence: Divergence | None = None) -> None:
        super().__init__(beta, divergence)

    def loss(self, margins: Tensor) -> Tensor:
        """The loss of each margin, (P,)."""
        return torch.relu(1 - margins)


class IPO(MarginObjective):
    """IPO: the difference h of log-ratios is to be 1/(2τ), neither less nor more.

    Log-ratios are averages over the tokens of a response, as the authors confirmed to the field that theirs are; the
    equation does not say so. Implicit rewards are τ·log(π/π_ref)/|y|, whose margin is to be 1/2.

    Args:
        tau: Strength of the pull towards the reference; positive.
        divergence: What holds the policy to the reference; by default the reverse KL divergence.

    Raises:
        ValueError: If a parameter is outside its range.

    References:
        Azar et al. 2023, arXiv:2310.12036, Eq. 17.

    Example:
        >>> policy = PairLogps.from_sums([-10.0], [-12.0], lengths=(4, 2))
        >>> IPO(tau=0.5)(policy, PairLogps.from_sums([-11.0], [-11.0]))  # (1/4 + 1/2 - 1)²
        tensor([0.0625])
    """

    def __init__(self, tau: float = 0.1, divergence: Divergence | None = None) -> None:
        super().__init__(positive("tau", tau), divergence)
        self.tau = tau

    def rewards(self, policy: PairLogps, reference: PairLogps) -> Rewards:
        """The implicit rewards τ·f'(π/π_ref) / |y|."""
        whole = super().rewards(policy, reference)
        return Rewards(whole.chosen / policy.chosen_lengths, whole.rejected / policy.rejected_lengths)

    def loss(self, margins: Tensor) -> Tensor:
        """(h - 1/(2τ))² with h = margin/τ, (P,)."""
        return (margins / self.tau - 1 / (2 * self.tau)).square()


class EXOPair(MarginObjective):
    """EXO on pairs: KL from the policy's preference σ(margin) to the label, smoothed.

    Args:
        beta: Strength of the pull towards the reference; positive.
        label_smoothing: Probability ε of the rejected response under the label, in (0, 0.5).
        divergence: What holds the policy to the reference; by default the reverse KL divergence.

    Raises:
        ValueError: If a parameter is outside its range.

    References:
        Ji et al. 2024, arXiv:2402.00856, Eq. 16 (EXO-pref), with β of its Appendix B.

    Example:
        >>> policy, reference = PairLogps.from_sums([-10.0], [-12.0]), PairLogps.from_sums([-11.0], [-11.0])
        >>> EXOPair(beta=0.5, label_smoothing=0.1)(policy, reference)
        tensor([0.1141])
    """

    def __init__(self, beta: float = 0.1, label_smoothing: float = 1e-3, divergence: Divergence | None = None) -> None:
        super().__init__(beta, divergence)
        self.label_smoothing = within("label_smoothing", label_smoothing, 0, 0.5, "()")

    def loss(self, margins: Tensor) -> Tensor:
        """KL of (σ(m), σ(-m)) from (1 - ε, ε), (P,)."""
        chosen = margins.sigmoid() * (logsigmoid(margins) - math.log1p(-self.label_smoothing))
        rejected = (-margins).sigmoid() * (logsigmoid(-margins) - math.log(self.label_smoothing))
        return chosen + rejected


class DiscoPOP(MarginObjective):
    """DiscoPOP, the log-ratio modulated loss: logistic for small margins m, exponential for large, mixed by σ(m/τ).

    It is not monotone: between margins of about -0.12 and 0.07 (τ = 0.05) it rises.

    Args:
        beta: Strength of the pull towards the reference; positive.
        tau: Temperature of the mixture; positive, below 1.
        divergence: What holds the policy to the reference; by default the reverse KL divergence.

    Raises:
        ValueError: If a parameter is outside its range.

    References:
        Lu et al. 2024, arXiv:2406.08414, Eq. 5, with its β and τ.

    Example:
        >>> policy, reference = PairLogps.from_sums([-10.0], [-12.0]), PairLogps.from_sums([-11.0], [-11.0])
        >>> DiscoPOP(beta=0.05, tau=0.05)(policy, reference)
        tensor([0.8738])
    """

    def __init__(self, beta: float = 0.05, tau: float = 0.05, divergence: Divergence | None = None) -> None:
        super().__init__(beta, divergence)
        self.tau = within("tau", tau, 0, 1, "()")

    def loss(self, margins: Tensor) -> Tensor:
        """σ(-m/τ)·(-log σ(m)) + σ(m/τ)·exp(-m), (P,)."""
        # exp(-m)·σ(m/τ) in one exponential: apart they would be ∞·0 for margins far below zero.
        return (-margins / self.tau).sigmoid() * logistic(margins) + (logsigmoid(margins / self.tau) - margins).exp()
