"""Other losses on the margin of implicit rewards: squared, hinge, KL divergence, and one found by search."""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_dpo.objectives.base import PairLogps, Rewards, positive, within
from lit_dpo.objectives.divergences import Divergence
from lit_dpo.objectives.dpo import MarginObjective, logistic


class Hinge(MarginObjective):
    """SLiC's hinge loss on the margin of implicit rewards. Pairs with a margin above 1 have no gradient.

    Args:
        beta: Strength of the pull towards the reference; positive.
        divergence: Divergence that keeps the policy close to the reference; by default the reverse KL divergence.

    Raises:
        ValueError: If a parameter is outside its range.

    References:
        Zhao et al. 2023, arXiv:2305.10425 (SLiC-HF), Section 2. With a reference: Liu et al. 2023, arXiv:2309.06657
        (hinge-norm in RSO); default β is its γ.

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
    """IPO: a squared loss with the target 1/(2τ) for the difference h of log-ratios.

    Log-ratios are averaged over the tokens of a response. The paper's equation does not say so, but its authors have
    confirmed it. Implicit rewards are τ·log(π/π_ref)/|y|; the target for their margin is 1/2.

    Args:
        tau: Strength of the pull towards the reference; positive.
        divergence: Divergence that keeps the policy close to the reference; by default the reverse KL divergence.

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
    """EXO on pairs: KL(p‖q) of the policy's preference p = σ(margin) and the smoothed label q.

    Args:
        beta: Strength of the pull towards the reference; positive.
        label_smoothing: Probability ε that the smoothed label gives to the rejected response, in (0, 0.5).
        divergence: Divergence that keeps the policy close to the reference; by default the reverse KL divergence.

    Raises:
        ValueError: If a parameter is outside its range.

    References:
        Ji et al. 2024, arXiv:2402.00856, Eq. 16 (EXO-pref); default β from Appendix B.

    Example:
        >>> policy, reference = PairLogps.from_sums([-10.0], [-12.0]), PairLogps.from_sums([-11.0], [-11.0])
        >>> EXOPair(beta=0.5, label_smoothing=0.1)(policy, reference)
        tensor([0.1141])
    """

    def __init__(self, beta: float = 0.1, label_smoothing: float = 1e-3, divergence: Divergence | None = None) -> None:
        super().__init__(beta, divergence)
        self.label_smoothing = within("label_smoothing", label_smoothing, 0, 0.5, "()")

    def loss(self, margins: Tensor) -> Tensor:
        """KL(p‖q) with p = (σ(m), σ(-m)) and q = (1 - ε, ε), for each margin m, (P,)."""
        chosen = margins.sigmoid() * (logsigmoid(margins) - math.log1p(-self.label_smoothing))
        rejected = (-margins).sigmoid() * (logsigmoid(-margins) - math.log(self.label_smoothing))
        return chosen + rejected


class DiscoPOP(MarginObjective):
    """DiscoPOP, the log-ratio modulated loss: σ(m/τ) blends a logistic loss into an exponential one as m grows.

    m is the margin. The loss is not monotone: for τ = 0.05 it rises between margins of about -0.12 and 0.07.

    Args:
        beta: Strength of the pull towards the reference; positive.
        tau: Temperature τ of the blend of the two losses; between 0 and 1, both excluded.
        divergence: Divergence that keeps the policy close to the reference; by default the reverse KL divergence.

    Raises:
        ValueError: If a parameter is outside its range.

    References:
        Lu et al. 2024, arXiv:2406.08414, Eq. 5; default β and τ from the paper.

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
        # exp(-m)·σ(m/τ) as one exponential: as two factors it would be ∞·0 for margins far below zero.
        return (-margins / self.tau).sigmoid() * logistic(margins) + (logsigmoid(margins / self.tau) - margins).exp()
