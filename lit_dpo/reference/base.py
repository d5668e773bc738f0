"""The interface of all references: log-probs of a batch, without gradients."""

from abc import ABC, abstractmethod

import torch

from lit_dpo.data.batch import PairBatch
from lit_dpo.objectives import PairLogps


class Reference(ABC):
    """Computes the log-probs that the policy is compared with.

    Attributes:
        exists: Whether there are log-probs to compare with; False for ``NoReference``.
    """

    exists = True

    @abstractmethod
    def logps(self, batch: PairBatch) -> PairLogps:
        """Log-probs of P pairs, without gradients."""

    def end_step(self, step: int) -> None:  # noqa: B027
        """Called after each optimizer step, counted from 1. A reference that follows the policy is updated here."""


class NoReference(Reference):
    """Zeros instead of log-probs, for objectives that use no reference."""

    exists = False

    def logps(self, batch: PairBatch) -> PairLogps:
        """Zeros for P pairs."""
        return batch.sum_responses(torch.zeros(len(batch.targets), device=batch.targets.device))
