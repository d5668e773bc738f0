"""The learning rate over a run: warm-up, then one of transformers' schedules."""

from typing import Any, Literal, TypeAlias

import torch
from lightning.pytorch import Trainer
from transformers import get_scheduler

LRSchedule: TypeAlias = Literal["linear", "cosine", "constant", "inverse_sqrt", "polynomial"]


def warmup_scheduler(optimizer: torch.optim.Optimizer, schedule: LRSchedule, warmup: float, trainer: Trainer) -> Any:
    """A learning-rate scheduler for the whole run. It must be advanced at each optimizer step.

    Args:
        optimizer: The optimizer.
        schedule: Schedule after warm-up, by its name in transformers.
        warmup: Share of the steps in which the rate rises from 0.
        trainer: The Trainer, which knows the number of steps.

    Raises:
        ValueError: If the run has no end.
    """
    total = trainer.estimated_stepping_batches
    if total == float("inf"):
        raise ValueError("The learning-rate schedule needs an end: set trainer.max_epochs or trainer.max_steps.")
    name = "constant_with_warmup" if schedule == "constant" else schedule
    return get_scheduler(name, optimizer, round(warmup * total), int(total))


def set_rate(optimizer: torch.optim.Optimizer, rate: float | None) -> None:
    """Sets the learning rate of all parameters; None leaves what the optimizer was built with."""
    for group in optimizer.param_groups if rate is not None else ():
        group["lr"] = rate
