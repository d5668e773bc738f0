"""The optimizer step in progress: its batches with losses and log-probs, and a few numbers for each pair."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lit_dpo.data.batch import PairBatch
from lit_dpo.objectives import PairLogps
from lit_dpo.training.metrics import token_kl


class PairNumbers(NamedTuple):
    """Where one pair comes from, and its loss, displacement and KL in a step."""

    source: str
    row: int
    loss: float
    displacement: float  # chosen log-prob minus the reference's, nats per token; NaN without a reference
    kl: float  # KL divergence from the reference, mean over response tokens, nats; NaN without a reference


class BatchRecord(NamedTuple):
    """One batch of a step, without gradients."""

    batch: PairBatch
    losses: Tensor  # (P,)
    policy: PairLogps
    reference: PairLogps | None

    def pairs(self) -> list[PairNumbers]:
        """The ``PairNumbers`` of each pair in the batch."""
        num_tokens = [sum(segment.trained) for segment in self.batch.segments]
        displacement = kl = torch.full_like(self.losses, torch.nan)
        responses = self.policy.responses
        if self.reference is not None and self.reference.responses is not None and responses is not None:
            displacement = (self.policy.chosen - self.reference.chosen) / self.policy.chosen_lengths
            kl = torch.stack([p.mean() for p in token_kl(responses, self.reference.responses).split(num_tokens)])
        numbers = zip(self.losses.tolist(), displacement.tolist(), kl.tolist(), strict=True)
        return [PairNumbers(*origin, *row) for origin, row in zip(self.batch.origins, numbers, strict=True)]


class OptimizerStep:
    """The optimizer step in progress.

    Attributes:
        batches: The batches of the step so far.
        latest: The last batch, of training or of an evaluation; None before the first.
        means: Metrics of the last step over all ranks, with ``grad_norm``, the norm of its gradient before clipping,
            and ``learning_rate``, that of the first group of parameters.
        taken: Whether the optimizer changed the weights at the last step.
        finite: Whether loss and gradient of the last step were finite. A GradScaler also skips steps whose gradient
            overflows. Such a step is not taken, but it counts as finite.
    """

    def __init__(self) -> None:
        self.batches: list[BatchRecord] = []
        self.latest: BatchRecord | None = None
        self.means: dict[str, float] = {}
        self.taken = self.finite = True
        self._steps_before = 0

    def add(self, record: BatchRecord, *, trains: bool) -> None:
        """Adds a batch: to the step, if it trains, and as the latest one."""
        self.latest = record
        if trains:
            self.batches.append(record)

    def start_batch(self, trainer: Trainer) -> None:
        """Called before each batch."""
        self._steps_before = trainer.global_step

    def is_complete(self, trainer: Trainer) -> bool:
        """Whether the current batch ended an optimizer step. Otherwise its gradients are accumulated."""
        return trainer.global_step > self._steps_before

    def pairs(self) -> list[PairNumbers]:
        """The ``PairNumbers`` of each pair in the step."""
        return [pair for record in self.batches for pair in record.pairs()]


def name_pairs(pairs: Sequence[PairNumbers], most: int = 5) -> str:
    """Source and row of the first ``most`` pairs, for messages."""
    rows: dict[str, list[str]] = {}
    for pair in pairs[:most]:
        rows.setdefault(pair.source, []).append(str(pair.row))
    named = "; ".join(f"{source} row{'s'[: len(found) > 1]} {', '.join(found)}" for source, found in rows.items())
    return named + (f" and {len(pairs) - most} more" if len(pairs) > most else "")
