"""Exact resume: a run restores the random states of a checkpoint, but keeps its own optimizer settings."""

import random
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lit_dpo.training.hyperparameters import plain_optimizer
from lit_dpo.training.position import ACCUMULATE, PER_BATCH, EpochPosition
from lit_dpo.training.ranks import gather_objects

Group = dict[str, Any]
AVERAGE = "adapter_average"  # what AdapterAverage keeps in a checkpoint


class ExactResume(Callback):
    """Saves and restores random states, and keeps the run's own optimizer settings when a checkpoint is loaded.

    ``DPOModule`` adds this callback itself. Lightning saves no random states. It restores optimizers with
    ``load_state_dict``, which also replaces the settings of each parameter group with those of the checkpoint.
    """

    def __init__(self) -> None:
        self._own_groups: list[list[Group]] = []  # for each optimizer, the settings that this run built it with
        self._fresh_states: list[dict[Any, Any]] = []  # for each optimizer, its state before the first step
        self._random_states: list[Any] | None = None
        self._stored_optimizer: str | None = None
        self._step_ratio = 1.0  # steps of this run for one of the checkpoint's

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Adds the random states of all ranks, and the class and settings of the optimizer."""
        checkpoint["random_states"] = gather_objects(trainer, random_state())
        close_epoch(checkpoint.get("loops", {}).get("fit_loop"))
        if trainer.optimizers:
            checkpoint["hyper_parameters"]["optimizer"] = plain_optimizer(trainer.optimizers[0])

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Keeps the checkpoint's random states and optimizer class until training starts."""
        self._random_states = checkpoint.get("random_states")
        if AVERAGE in checkpoint and trainer.state.fn == "fit" and not _averages(trainer):
            rank_zero_warn(
                "The checkpoint's weights are those of AdapterAverage, and this run averages none: it trains on from "
                "the average. To go on as before, add the callback."
            )
        self._step_ratio = fit_batches(trainer, checkpoint) if trainer.state.fn == "fit" else 1.0
        self._stored_optimizer = checkpoint.get("hyper_parameters", {}).get("optimizer", {}).get("class_path")

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Keeps the settings of each parameter group, before Lightning restores the optimizers."""
        self._own_groups = [
            [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
            for optimizer in trainer.optimizers
        ]
        # Some optimizers (Adagrad in torch 2.11) create their state when they are built and need it at the first step.
        self._fresh_states = [dict(optimizer.state) for optimizer in trainer.optimizers]

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Restores this rank's random generators and this run's optimizer settings, if a checkpoint was loaded."""
        if self._random_states is None:
            return
        if trainer.global_rank < len(self._random_states):
            restore_random_state(self._random_states[trainer.global_rank])
        self._random_states = None
        schedulers = {id(config.scheduler.optimizer): config.scheduler for config in trainer.lr_scheduler_configs}
        for optimizer, groups, state in zip(trainer.optimizers, self._own_groups, self._fresh_states, strict=True):
            own = plain_optimizer(optimizer)["class_path"]
            if own != self._stored_optimizer:
                rank_zero_warn(
                    f"The checkpoint's optimizer is {self._stored_optimizer}. This run's {own} starts afresh."
                )
                optimizer.state.clear()
                optimizer.state.update(state)
            apply_settings(optimizer, groups, schedulers.get(id(optimizer)))
        for config in trainer.lr_scheduler_configs:
            if self._step_ratio != 1 and config.interval == "step" and trainer.max_steps < 0:
                config.scheduler.last_epoch = round(config.scheduler.last_epoch * self._step_ratio)


def _averages(trainer: Trainer) -> bool:
    return any(type(callback).__name__ == "AdapterAverage" for callback in getattr(trainer, "callbacks", []))


def fit_batches(trainer: Trainer, checkpoint: dict[str, Any]) -> float:
    """Fits the stored count of batches to this run's size of batches, in place.

    Returns:
        The number of this run's optimizer steps that take as many pairs as one of the checkpoint's.
    """
    data: Any = getattr(trainer, "datamodule", None)
    position = getattr(data, "position", None)
    if not isinstance(position, EpochPosition):
        return 1.0
    was = checkpoint.get(type(data).__qualname__, {})
    stored, fit_loop = data.resumed_position(), checkpoint["loops"]["fit_loop"]
    if stored is None or PER_BATCH not in was:
        return 1.0
    epochs, batches = fit_loop["epoch_progress"]["current"], fit_loop["epoch_loop.batch_progress"]
    first = position.sampler(stored).first_batch(stored["epoch"])
    amid = epochs["processed"] < epochs["started"] and not batches["is_last_batch"]
    if amid:
        ahead = first - batches["current"]["processed"]
        batches["current"].update({name: count + ahead for name, count in batches["current"].items()})
    accumulate = was.get(ACCUMULATE, trainer.accumulate_grad_batches)
    if accumulate != trainer.accumulate_grad_batches:
        rank_zero_warn(
            f"trainer.accumulate_grad_batches was {accumulate} and is now {trainer.accumulate_grad_batches}. The "
            "schedule of the learning rate goes on at the same share of the run."
        )
    return float(was[PER_BATCH] * accumulate / (position.order[PER_BATCH] * trainer.accumulate_grad_batches))


def close_epoch(fit_loop: dict[str, Any] | None) -> None:
    """Marks an epoch as done in a stored state of the training loop, if all its batches are done, in place.

    Between the last batch of an epoch and its end, during the evaluation, Lightning's state says that the epoch goes
    on. Resumed from there, Lightning finds no batch left, and skips the next epoch without training on it. Here a
    resumed run begins the next epoch; the evaluation that was not finished is not repeated.
    """
    if fit_loop is None:
        return
    epochs, batches = fit_loop["epoch_progress"], fit_loop["epoch_loop.batch_progress"]
    if not batches["is_last_batch"] or epochs["current"]["processed"] == epochs["current"]["started"]:
        return
    unfinished = batches["current"]["completed"] < batches["current"]["processed"]  # the step's hooks are running
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] += int(unfinished)
    for which in ("current", "total"):
        epochs[which]["processed"] += 1
        batches[which]["completed"] = batches[which]["processed"]


def apply_settings(optimizer: torch.optim.Optimizer, groups: list[Group], scheduler: Any = None) -> None:
    """Restores this run's settings of each parameter group, which a checkpoint has replaced.

    Args:
        optimizer: The optimizer, after ``load_state_dict``.
        groups: This run's settings of each parameter group.
        scheduler: The learning-rate scheduler, or None. It keeps its position, and its current rate is multiplied by
            the ratio of this run's initial rate to the checkpoint's.
    """
    base_rates = getattr(scheduler, "base_lrs", None)
    for index, (group, own) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
        for name in optimizer.defaults.keys() & own.keys() - {"lr"}:
            group[name] = own[name]
        rate = own.get("initial_lr", own.get("lr"))
        if scheduler is None:
            group["lr"] = rate
        elif base_rates is not None and base_rates[index] != rate:
            group["lr"] *= rate / base_rates[index]
            group["initial_lr"] = base_rates[index] = rate


def random_state() -> dict[str, Any]:
    """State of this process's random generators: torch, its current CUDA device, and Python."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Sets the random generators to a state that ``random_state`` returned."""
    torch.set_rng_state(state["torch"].cpu())
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
