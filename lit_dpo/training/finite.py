"""Prevents optimizer steps whose loss or gradient is not finite, and writes a file that reproduces such a step."""

import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_dpo.data.batch import PairBatch
from lit_dpo.data.tokenization import TokenizedPair
from lit_dpo.training.ranks import gather_objects
from lit_dpo.training.run_dir import run_dir
from lit_dpo.training.step import BatchRecord, name_pairs

PAIRS = "nonfinite_step"  # key in the checkpoint: the pairs of each batch of the step
MOST_IN_A_ROW = 10  # the run stops at this many steps in a row that are not finite
OnNonfinite: TypeAlias = Literal["stop", "skip"]


class NonFiniteLossError(ValueError):
    """A loss or a gradient is not finite. The optimizer step was not taken."""


class FiniteSteps(Callback):
    """Prevents optimizer steps whose loss or gradient is not finite.

    ``DPOModule`` adds this callback itself. Under a GradScaler, a large scale can make a gradient overflow. The scaler
    then skips the step and halves its scale. Below 1 the scale cannot be the cause, and the step counts as not finite.

    Args:
        on_nonfinite: ``stop`` the run, or ``skip`` the optimizer step. The tenth such step in a row stops the run.
    """

    def __init__(self, on_nonfinite: OnNonfinite) -> None:
        self.on_nonfinite = on_nonfinite
        self._in_a_row = self._skipped = 0
        self._pairs: list[Any] | None = None  # for the checkpoint that reproduces the step

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Resets the counters."""
        self._in_a_row = self._skipped = 0

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Warns once more if steps were skipped."""
        if self._skipped:
            rank_zero_warn(f"{self._skipped} steps were skipped because their loss or gradient was not finite.")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Reads the metrics of the step, and checks its losses and its gradient before clipping.

        This is the only place in a step where the host waits for a GPU. All ranks read the same numbers: a loss that is
        not finite on one rank makes the mean over all ranks not finite.

        Raises:
            NonFiniteLossError: If one is not finite and the run must stop.
        """
        step = pl_module.step
        means = pl_module.train_metrics.compute(grad_norm=_gradient_norm(optimizer))
        step.means = {name: value.item() for name, value in means.items()}
        step.means["learning_rate"] = float(optimizer.param_groups[0]["lr"])
        norm = step.means["grad_norm"]
        step.finite = math.isfinite(step.means["loss"]) and (math.isfinite(norm) or _may_overflow(trainer))
        step.taken = math.isfinite(norm) and step.finite
        self._in_a_row = 0 if step.finite else self._in_a_row + 1
        if step.finite:
            return
        path = run_dir(trainer) / f"nonfinite-step{trainer.global_step + 1}.ckpt"
        self._pairs = [batch for rank in gather_objects(trainer, _plain_pairs(step.batches)) for batch in rank]
        if not getattr(trainer, "fast_dev_run", False):  # a dry run leaves no files
            trainer.save_checkpoint(path, weights_only=False)  # with optimizer and data position, for resuming
        self._pairs = None
        pairs = [pair for rank in gather_objects(trainer, step.pairs()) for pair in rank]
        failed = [pair for pair in pairs if not math.isfinite(pair.loss)]
        what = f"the loss of {name_pairs(failed)}" if failed else f"the gradient (norm {norm}) of {name_pairs(pairs)}"
        message = f"Step {trainer.global_step + 1}: {what} is not finite. Policy and pairs are in {path}."
        if self.on_nonfinite == "stop":
            raise NonFiniteLossError(f"{message} To go on without this step, set model.on_nonfinite=skip.")
        if self._in_a_row == MOST_IN_A_ROW:
            raise NonFiniteLossError(
                f"{message} It is the {MOST_IN_A_ROW}th such step in a row: the policy has diverged."
            )
        rank_zero_warn(f"{message} The step is skipped.")
        self._skipped += 1
        optimizer.zero_grad()  # an optimizer leaves parameters without a gradient unchanged

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Adds the pairs of a step that was not finite."""
        if self._pairs is not None:
            checkpoint[PAIRS] = self._pairs


def read_nonfinite_step(path: str | Path) -> list[PairBatch]:
    """The batches of a step whose loss or gradient was not finite.

    The file is also a checkpoint: ``DPOModule.load_from_checkpoint(path)`` gives the policy before that step.

    Args:
        path: Path of a ``nonfinite-stepN.ckpt`` file.

    Raises:
        ValueError: If the file is a checkpoint of another kind.
    """
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if PAIRS not in checkpoint:
        raise ValueError(f"{path} is not the checkpoint of a step whose loss was not finite.")
    return [PairBatch.from_pairs([TokenizedPair(**pair) for pair in batch]) for batch in checkpoint[PAIRS]]


def _plain_pairs(step: Iterable[BatchRecord]) -> list[list[dict[str, Any]]]:
    """The pairs of each batch as plain values, which a checkpoint can hold under ``weights_only=True``."""
    plain = [[asdict(pair) for pair in record.batch.pairs()] for record in step]
    return [[{name: value for name, value in pair.items() if name != "stored_key"} for pair in one] for one in plain]


def _gradient_norm(optimizer: torch.optim.Optimizer) -> Tensor:
    """The Euclidean norm of all gradients together, a scalar."""
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    norm: Any = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # type: ignore[no-any-return]  # a DTensor


def _may_overflow(trainer: Trainer) -> bool:
    """Whether a GradScaler's scale may be the reason why a gradient is not finite."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler is not None and scaler.get_scale() >= 1
