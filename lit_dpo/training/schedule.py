"""The optimizer, and the learning rate over a run: warm-up, then one of transformers' schedules."""

from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeAlias

import torch
from lightning.pytorch import Trainer
from torch.nn import Parameter
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


def build_optimizer(
    make: Callable[[Iterable[Parameter]], torch.optim.Optimizer], parameters: Iterable[Parameter], rate: float | None
) -> torch.optim.Optimizer:
    """The optimizer of those parameters that train.

    Args:
        make: Builds it.
        parameters: All parameters.
        rate: The learning rate of all parameters; None leaves what ``make`` sets.

    Raises:
        ValueError: If the optimizer does not take its settings, or cannot train adapters.
    """
    try:
        optimizer = make(parameter for parameter in parameters if parameter.requires_grad)
    except (TypeError, ValueError) as error:
        raise ValueError(f"model.optimizer does not take its settings: {error}.") from error
    if isinstance(optimizer, torch.optim.SparseAdam | torch.optim.LBFGS):
        raise ValueError(
            f"model.optimizer {type(optimizer).__name__} does not serve here: SparseAdam needs sparse gradients, and "
            "LBFGS computes the loss several times in a step. Use another, such as AdamW."
        )
    if rate is not None:
        for settings in (optimizer.defaults, *optimizer.param_groups):  # a checkpoint stores the defaults
            settings["lr"] = rate
    return optimizer
