"""Checks before anything is computed: objective and data, the Trainer's strategy, callbacks that average weights."""

from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch.distributed.device_mesh import DeviceMesh

from lit_dpo.objectives import Objective
from lit_dpo.policy.precision import dtype_for, precision_for

TESTED_STRATEGIES = (SingleDeviceStrategy, DDPStrategy)


class Placement(NamedTuple):
    """Where and in which type the policy computes."""

    dtype: torch.dtype  # of matrix products
    device: torch.device  # of this process
    mesh: DeviceMesh | None = None  # the processes over which the base is split


def check_data(objective: Objective, data: Any, stage: str) -> None:
    """Checks whether the data has what the objective uses.

    Args:
        objective: The objective.
        data: The data module, or None. Only a ``PreferenceDataModule`` is checked.
        stage: Lightning's stage, such as ``fit`` or ``predict``.

    Raises:
        ValueError: If the data lacks what the objective needs, or has responses that the objective would ignore.
    """
    name, most = type(objective).__name__, getattr(data, "max_responses", None)
    if most is not None and most > 2 and not objective.ranks_lists:
        raise ValueError(
            f"data.max_responses={most}: {name} compares two responses and would ignore the others. Use PlackettLuce, "
            "or set data.max_responses=2."
        )
    if most == 2 and objective.ranks_lists:
        rank_zero_warn(f"{name} ranks only two responses per row. Set data.max_responses if the rows have more.")
    if objective.uses_scores and stage != "predict":
        for pairs in (getattr(data, "train_pairs", None), getattr(data, "val_pairs", None)):
            if pairs is not None:
                pairs.require_scores(name)


def checked_placement(trainer: Trainer | None, quantized: bool) -> Placement:
    """Where this rank computes, and in which type.

    Args:
        trainer: The Trainer; None for a module without one (``load_from_checkpoint``, or a script that only generates).
        quantized: Whether the base is quantized.

    Raises:
        ValueError: If the Trainer's precision, strategy or callbacks would corrupt the weights or train wrongly.
    """
    if trainer is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return Placement(dtype_for(precision_for(device)), device)
    check_trainer(trainer, quantized)
    strategy = trainer.strategy
    return Placement(dtype_for(trainer.precision), strategy.root_device, getattr(strategy, "mesh", None))


def check_trainer(trainer: Trainer, quantized: bool) -> None:
    """Checks the strategy, how often the run evaluates, and that no callback averages packed weights.

    Raises:
        ValueError: If a check fails. The message names the strategy or the callback, and the remedy.
    """
    kind = _lightning_class(trainer.strategy)
    if kind not in TESTED_STRATEGIES:
        raise ValueError(
            f"trainer.strategy {type(trainer.strategy).__name__} is not supported: it has not been tested, and a "
            "strategy that shards weights could silently train each rank separately. Use one device, "
            "trainer.strategy=ddp or, if the base does not fit on one GPU, trainer.strategy=sharded."
        )
    if getattr(trainer, "accumulate_grad_batches", 1) < 1:
        raise ValueError("trainer.accumulate_grad_batches is at least 1.")
    if getattr(trainer, "check_val_every_n_epoch", None) == 0:
        raise ValueError(
            "trainer.check_val_every_n_epoch must be 1 or more. To leave evaluations out: limit_val_batches=0."
        )
    for callback in getattr(trainer, "callbacks", []):
        if quantized and isinstance(callback, WeightAveraging | StochasticWeightAveraging):
            raise ValueError(
                f"{type(callback).__name__} averages all weights, and an average of packed 4-bit or 8-bit codes is "
                "meaningless. lit_dpo.callbacks.AdapterAverage averages the adapters alone."
            )


def _lightning_class(strategy: Any) -> type:
    """The first Lightning class among a strategy's own class and its base classes."""
    return next(kind for kind in type(strategy).__mro__ if kind.__module__.startswith("lightning."))
