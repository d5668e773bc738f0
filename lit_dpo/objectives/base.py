"""What every objective takes and gives: summed log-probabilities in, implicit rewards and a loss per pair out."""

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor


class TokenStatistics(NamedTuple):
    """What a policy's distribution p was like at each of R response tokens, without gradients."""

    entropy: Tensor  # (R,) nats
    top1: Tensor  # (R,) 1 where the token was the most likely one, else 0
    log_sum_squares: Tensor  # (R,) log Σ p²


class PairLogps(NamedTuple):
    """Log-probabilities of the responses of P pairs, in nats."""

    chosen: Tensor  # (P,) summed over response tokens
    rejected: Tensor  # (P,)
    chosen_lengths: Tensor  # (P,) response tokens
    rejected_lengths: Tensor  # (P,)
    statistics: TokenStatistics | None = None  # if asked for; pairs in order, chosen before rejected


class Rewards(NamedTuple):
    """Implicit rewards of the responses of P pairs."""

    chosen: Tensor  # (P,)
    rejected: Tensor  # (P,)

    @property
    def margins(self) -> Tensor:
        """Reward of the chosen response less that of the rejected one, (P,)."""
        return self.chosen - self.rejected


class Objective(ABC):
    """A preference loss. Parameters of a subclass are plain values, kept under their own names.

    Args:
        beta: Strength of the pull towards the reference; positive.

    Raises:
        ValueError: If ``beta`` is not positive.
    """

    def __init__(self, beta: float = 0.1) -> None:
        if beta <= 0:
            raise ValueError(f"objective.beta must be positive, not {beta}.")
        self.beta = beta

    def rewards(self, policy: PairLogps, reference: PairLogps) -> Rewards:
        """The implicit rewards β·log(π/π_ref), without the prompt's partition function, which cancels in the margin.

        References:
            Rafailov et al. 2023, arXiv:2305.18290, Eq. 5.
        """
        return Rewards(
            self.beta * (policy.chosen - reference.chosen),
            self.beta * (policy.rejected - reference.rejected),
        )

    @abstractmethod
    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """The loss of each pair, (P,)."""

    def __repr__(self) -> str:
        parameters = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({parameters})"
