"""f-divergences that keep the policy close to the reference. DPO uses the reverse KL divergence.

Each class gives f'(u) at u = π/π_ref as a function of log u, up to a constant. The constant cancels in the margin.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_dpo.objectives.base import within

LARGEST_EXPONENT = 80.0  # exponents are clamped here, before exp overflows float32; the gradient beyond is 0


class Divergence(ABC):
    """The derivative f' of an f-divergence.

    References:
        Wang et al. 2023, arXiv:2309.16240 (f-DPO), Table 1.
    """

    @abstractmethod
    def __call__(self, log_ratios: Tensor) -> Tensor:
        """f'(u), given log u: elementwise, up to a constant."""

    def __repr__(self) -> str:
        parameters = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({parameters})"


class ReverseKL(Divergence):
    """KL(π‖π_ref), f'(u) = log u (+ 1), as in DPO.

    Example:
        >>> ReverseKL()(torch.tensor([0.5]))
        tensor([0.5000])
    """

    def __call__(self, log_ratios: Tensor) -> Tensor:
        """The input, log u, unchanged."""
        return log_ratios


class ForwardKL(Divergence):
    """KL(π_ref‖π), f'(u) = -1/u (+ 1).

    Example:
        >>> ForwardKL()(torch.tensor([0.0, 1.0]))
        tensor([0.0000, 0.6321])
    """

    def __call__(self, log_ratios: Tensor) -> Tensor:
        """1 - 1/u."""
        return -torch.expm1((-log_ratios).clamp(max=LARGEST_EXPONENT))


class JensenShannon(Divergence):
    """The Jensen–Shannon divergence, f'(u) = log(2u / (1 + u)).

    Example:
        >>> JensenShannon()(torch.tensor([0.0, 100.0]))  # never more than ln 2
        tensor([0.0000, 0.6931])
    """

    def __call__(self, log_ratios: Tensor) -> Tensor:
        """log(2u / (1 + u))."""
        return math.log(2) + logsigmoid(log_ratios)


class AlphaDivergence(Divergence):
    """The α-divergence, f'(u) = (1 - u^-α) / α, between the reverse (α → 0) and the forward KL divergence (α → 1).

    Args:
        alpha: Order of the divergence, in (0, 1). Towards 0 it is the reverse KL divergence, towards 1 the forward one.
            TRL's coefficient ``f_alpha_divergence_coef`` is 1 - α.

    Raises:
        ValueError: If α is outside its range.

    Example:
        >>> AlphaDivergence(0.5)(torch.tensor([0.0, 1.0]))
        tensor([0.0000, 0.7869])
    """

    def __init__(self, alpha: float = 0.5) -> None:
        self.alpha = within("divergence.alpha", alpha, 0, 1, "()")

    def __call__(self, log_ratios: Tensor) -> Tensor:
        """(1 - u^-α) / α."""
        return -torch.expm1((-self.alpha * log_ratios).clamp(max=LARGEST_EXPONENT)) / self.alpha
