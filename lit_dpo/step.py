"""What an optimizer step has been computed from, and the file that reproduces one whose loss was not finite."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_dpo.data.batch import PairBatch
from lit_dpo.data.tokenization import TokenizedPair
from lit_dpo.metrics import token_kl
from lit_dpo.objectives import PairLogps
from lit_dpo.run_dir import run_dir

PAIRS = "nonfinite_step"  # key of a checkpoint that holds the pairs of each batch of such a step


MOST_IN_A_ROW = 10  # failed steps that are skipped before it is plain that no other will come
OnNonfinite: TypeAlias = Literal["stop", "skip"]


class NonFiniteLossError(ValueError):
    """A loss or a gradient is not finite; the optimizer step was not taken."""


class PairNumbers(NamedTuple):
    """What one pair of a step looked like."""

    source: str
    row: int
    loss: float
    displacement: float  # of the chosen response, nats a token; NaN without a reference
    kl: float  # mean over the response tokens, nats; NaN without a reference
    num_tokens: int  # of the responses


class Observation(NamedTuple):
    """One batch of a step, without gradients."""

    batch: PairBatch
    losses: Tensor  # (P,)
    policy: PairLogps
    reference: PairLogps | None

    def pairs(self) -> list[PairNumbers]:
        """The numbers of each pair."""
        num_tokens = [sum(segment.responses) for segment in self.batch.segments]
        displacement = kl = torch.full_like(self.losses, torch.nan)
        responses = self.policy.responses
        if self.reference is not None and self.reference.responses is not None and responses is not None:
            displacement = (self.policy.chosen - self.reference.chosen) / self.policy.chosen_lengths
            kl = torch.stack([p.mean() for p in token_kl(responses, self.reference.responses).split(num_tokens)])
        numbers = zip(self.losses.tolist(), displacement.tolist(), kl.tolist(), num_tokens, strict=True)
        return [PairNumbers(*origin, *row) for origin, row in zip(self.batch.origins, numbers, strict=True)]


class FiniteSteps(Callback):
    """Takes care that nothing is trained on a loss or gradient that is not finite; logs ``train/grad_norm``.

    A ``DPOModule`` brings this callback with it. Under a GradScaler a gradient that is not finite skips the step by
    itself and halves the scale; it is a failure only once the scale, below 1, cannot be what overflows.

    Args:
        on_nonfinite: ``stop`` the run, or ``skip`` the optimizer step; but no more than ten in a row.
    """

    def __init__(self, on_nonfinite: OnNonfinite) -> None:
        self.on_nonfinite = on_nonfinite
        self._in_a_row = self._skipped = 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Counts anew."""
        self._in_a_row = self._skipped = 0

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Says at the end too that there were steps that were skipped."""
        if self._skipped:
            rank_zero_warn(f"{self._skipped} steps were skipped, for their loss or gradient was not finite.")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Looks at all losses of the step, and at its gradient before clipping.

        Raises:
            NonFiniteLossError: If one is not finite and the run is to stop.
        """
        norm = _gradient_norm(pl_module.parameters())
        pl_module.log("train/grad_norm", norm, batch_size=1)
        losses = all(bool(observation.losses.isfinite().all()) for observation in pl_module.observations)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        may_overflow = scaler is not None and scaler.get_scale() >= 1
        finite = losses and (may_overflow or math.isfinite(norm))
        pl_module.failed_step = not trainer.strategy.reduce_boolean_decision(finite, all=True)
        pl_module.kept_step = math.isfinite(norm) and not pl_module.failed_step
        self._in_a_row = self._in_a_row + 1 if pl_module.failed_step else 0
        if not pl_module.failed_step:
            return
        path = run_dir(trainer) / f"nonfinite-step{trainer.global_step + 1}.ckpt"
        batches = of_all_ranks(trainer, plain_pairs(pl_module.observations))
        pl_module.nonfinite_pairs = [batch for rank in batches for batch in rank]
        if not getattr(trainer, "fast_dev_run", False):  # which leaves nothing behind
            trainer.save_checkpoint(path, weights_only=False)  # with optimizer and place in the data, to go on from
        pl_module.nonfinite_pairs = None
        here = [pair for observation in pl_module.observations for pair in observation.pairs()]
        pairs = [pair for rank in of_all_ranks(trainer, here) for pair in rank]
        failed = [pair for pair in pairs if not math.isfinite(pair.loss)]
        what = f"the loss of {name_pairs(failed)}" if failed else f"the gradient (norm {norm}) of {name_pairs(pairs)}"
        message = f"Step {trainer.global_step + 1}: {what} is not finite. Policy and pairs are in {path}."
        if self.on_nonfinite == "stop":
            raise NonFiniteLossError(f"{message} model.on_nonfinite=skip would go on without this step.")
        if self._in_a_row == MOST_IN_A_ROW:
            raise NonFiniteLossError(f"{message} So were the {MOST_IN_A_ROW - 1} steps before: the policy is broken.")
        rank_zero_warn(f"{message} The step is skipped.")
        self._skipped += 1
        optimizer.zero_grad()  # an optimizer leaves alone what has no gradient


def _gradient_norm(parameters: Iterable[torch.nn.Parameter]) -> float:
    """The Euclidean norm of all gradients together."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # of sharded gradients


def name_pairs(pairs: Sequence[PairNumbers], most: int = 5) -> str:
    """Source and row of some pairs, for messages."""
    rows: dict[str, list[str]] = {}
    for pair in pairs[:most]:
        rows.setdefault(pair.source, []).append(str(pair.row))
    named = "; ".join(f"{source} row{'s'[: len(found) > 1]} {', '.join(found)}" for source, found in rows.items())
    return named + (f" and {len(pairs) - most} more" if len(pairs) > most else "")


def of_all_ranks(trainer: Trainer, value: Any) -> list[Any]:
    """What each rank has to tell, in their order."""
    if trainer.world_size == 1:
        return [value]
    values: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(values, value)
    return values


def plain_pairs(step: Iterable[Observation]) -> list[list[dict[str, Any]]]:
    """The pairs of each batch as plain values, which a checkpoint can hold under ``weights_only=True``."""
    return [[asdict(pair) for pair in observation.batch.pairs()] for observation in step]


def read_nonfinite_step(path: str | Path) -> list[PairBatch]:
    """The batches of a step whose loss or gradient was not finite.

    The file is a checkpoint too: ``DPOModule.load_from_checkpoint(path)`` gives the policy that met them.

    Args:
        path: A ``nonfinite-stepN.ckpt``.

    Raises:
        ValueError: If the checkpoint is another.
    """
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if PAIRS not in checkpoint:
        raise ValueError(f"{path} is not the checkpoint of a step whose loss was not finite.")
    return [PairBatch.from_pairs([TokenizedPair(**pair) for pair in batch]) for batch in checkpoint[PAIRS]]
